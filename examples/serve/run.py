"""The command: load, say what is there, serve until told to stop."""

import os
import time

import torch


def add_arguments(parser):
    """The command's options, in groups."""
    add = parser.add_argument_group("what to serve").add_argument
    add("--model", required=True, metavar="PATH", help="a causal language model: a folder, or a name on the hub")
    add("--name", help="what clients call the base model; the last part of its path unless given")
    add("--adapter", action="append", default=[], metavar="NAME=PATH", help="a folder in PEFT's format; again for more")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the model's weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs (%(default)s)")
    add = parser.add_argument_group("who may call").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    add("--port", type=int, default=8000, help="port to listen on, 0 for a free one (%(default)s)")
    add("--api-key", default=os.environ.get("FASTLORA_API_KEY"), help="asked of every call; or FASTLORA_API_KEY")
    add("--allow-runtime-lora", action="store_true", help="clients may load and unload adapters from --adapter-root")
    add("--adapter-root", metavar="FOLDER", help="the folder that they may load from, and nothing outside it")
    group = parser.add_argument_group("limits")
    for name, default, about in (
        ("adapters", 64, "adapters of rank 16 on the device at once"),
        ("max-rank", 256, "largest rank of an adapter"),
        ("cache-tokens", 8192, "tokens of all running requests together"),
        ("batch-tokens", 256, "tokens that one step may run"),
        ("max-requests", 256, "requests at once, others get a 429"),
        ("max-body", 2**20, "bytes of a request"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} ({default})")


def serve(args, parser):
    """Serve until a signal; returns the exit status."""
    if args.allow_runtime_lora != (args.adapter_root is not None):
        parser.error("--allow-runtime-lora and --adapter-root FOLDER go together")
    named = [entry.partition("=")[::2] for entry in args.adapter]
    if not all(name and path for name, path in named):
        parser.error("--adapter takes NAME=PATH")
    try:
        import uvicorn
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from fastlora.serve import attach
        from fastlora.serve.engine import Engine
        from fastlora.serve.server import Server
    except ImportError as error:
        parser.error(f"{error}: pip install --no-build-isolation '.[serve]'")
    start, name = time.perf_counter(), args.name or os.path.basename(os.path.normpath(args.model))
    print(f"fastlora: loading {args.model}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    pool = attach(model.requires_grad_(False), adapters=args.adapters, max_rank=args.max_rank)
    for adapter, path in named:
        if adapter == name:
            parser.error(f"--adapter {adapter}: that is the base model's name")
        print(f"   adapter   {adapter}: {path}", flush=True)
        pool.load(adapter, path)
    limits = {"cache_tokens": args.cache_tokens, "batch_tokens": args.batch_tokens, "most": args.max_requests}
    engine, root = Engine(model, pool, **limits), args.adapter_root
    server = Server(engine, tokenizer, name, adapter_root=root, api_key=args.api_key, max_body=args.max_body)
    for title, value in {
        "model": f"{name}, {model.num_parameters() / 1e6:.0f} M parameters, {model.dtype} on {model.device}",
        "pool": f"{args.adapters} adapters of rank 16, on {len(pool.layers)} layers",
        "cache": f"{args.cache_tokens} tokens, at most {engine.longest} for a request",
        "loading": f"from {args.adapter_root}" if args.adapter_root else "adapters only at the start",
        "ready": f"after {time.perf_counter() - start:.0f} s at http://{args.host}:{args.port} (Ctrl-C stops)",
    }.items():
        print(f"   {title:9} {value}", flush=True)
    try:
        uvicorn.run(server.app, host=args.host, port=args.port, log_level="warning")
    except KeyboardInterrupt:
        pass
    finally:
        engine.stop(timeout=0)
    return 0
