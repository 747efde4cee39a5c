"""An OpenAI-compatible server: `python examples/serve.py --model PATH --adapter NAME=PATH`."""

from serving.run import main

if __name__ == "__main__":
    raise SystemExit(main())
