"""An OpenAI-compatible server for a base model and a pool of adapters, an application of fastlora.serve.

`python examples/serve.py --help` starts it. `engine` drives transformers' continuous batching with an adapter for each
request, `server` is the HTTP interface, `run` the command.
"""
