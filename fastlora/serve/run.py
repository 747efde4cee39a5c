"""`python -m fastlora serve`: load, say what is there, serve until told to stop."""

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
    add = parser.add_argument_group("limits").add_argument
    add("--adapters", type=int, default=64, metavar="N", help="room for so many adapters of rank 16 at once (%(default)s)")
    add("--max-rank", type=int, default=256, metavar="N", help="largest rank of an adapter (%(default)s)")
    add("--cache-tokens", type=int, default=8192, metavar="N", help="tokens of all requests together (%(default)s)")
    add("--batch-tokens", type=int, default=256, metavar="N", help="tokens that one step may run (%(default)s)")
    add("--max-requests", type=int, default=256, metavar="N", help="requests at once, others get a 429 (%(default)s)")
    add("--max-body", type=int, default=2**20, metavar="BYTES", help="of a request (%(default)s)")


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
        parser.error(f"{error}: pip install 'fastlora-kernels[serve]'")
    start = time.perf_counter()
    name = args.name or os.path.basename(os.path.normpath(args.model))
    print(f"fastlora: loading {args.model}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    pool = attach(model.requires_grad_(False), adapters=args.adapters, max_rank=args.max_rank)
    for adapter, path in named:
        print(f"   adapter {adapter} from {path}", flush=True)
        if adapter == name:
            parser.error(f"--adapter {adapter}: that is the base model's name")
        pool.load(adapter, path)
    limits = {"cache_tokens": args.cache_tokens, "batch_tokens": args.batch_tokens, "most": args.max_requests}
    engine = Engine(model, pool, **limits)
    root = args.adapter_root if args.allow_runtime_lora else None
    server = Server(engine, tokenizer, name, adapter_root=root, api_key=args.api_key, max_body=args.max_body)
    _say(args, name, model, pool, engine, time.perf_counter() - start)
    try:
        uvicorn.run(server.app, host=args.host, port=args.port, log_level="warning")
    finally:
        engine.stop(timeout=0)
    return 0


def _say(args, name, model, pool, engine, seconds):
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    room = f"{len(pool.layers)} layers, room for {args.adapters} adapters of rank 16"
    lines = {
        "model": f"{name}, {model.num_parameters() / 1e6:.0f}M parameters, {model.dtype} on {model.device}{threads}",
        "adapters": ", ".join(pool.names()) or "none",
        "pool": room,
        "cache": f"{args.cache_tokens} tokens, {engine.longest} for one request",
        "key": "asked for" if args.api_key else "none",
        "loading": f"from {args.adapter_root}" if args.allow_runtime_lora else "off",
        "ready": f"in {seconds:.0f} s at http://{args.host}:{args.port}, Ctrl-C to stop",
    }
    print("\n".join(f"   {key:9} {value}" for key, value in lines.items()), flush=True)
