"""The main job, on a real language model: `make demo`.

SmolLM2-135M-Instruct gets LoRA adapters on all its linear layers, learns to write in the style of the standard
library's docstrings, is saved and loaded again, by this library and by PEFT, and then the same model is timed with the
plain layers, fastlora, loralib and PEFT side by side. Everything runs on the CPU, with files that are on the machine.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

import docstrings
import peft
from progress import progress, say

import fastlora
from benchmarks import clock, models, steps

STEPS, BATCH, LENGTH = 30, 4, 128
PROMPT = 'def sort_lines(text, reverse=False):\n    """'
METHODS = ("base", "fastlora", "loralib", "peft")


def main():
    start = time.perf_counter()
    torch.manual_seed(0)
    say("1. SmolLM2-135M-Instruct")
    model, tokenizer = models.load()
    print(f"   loaded in {time.perf_counter() - start:.0f} s")
    print("   What is the capital of France?", answer(model, tokenizer, "What is the capital of France?"))

    say("2. inject: LoRA into every linear layer but the head")
    trained = models.twin(model)
    train, held_out = docstrings.token_blocks(tokenizer, LENGTH)
    probe = held_out[:2]
    with torch.no_grad():
        before = trained(probe).logits
        fastlora.inject(trained, r=16, lora_alpha=32)
        difference = (trained(probe).logits - before).abs().max().item()
    fastlora.print_trainable_parameters(trained)
    print(f"   largest difference of a logit from the plain model's: {difference:.1e} (of {before.abs().max():.0f})")
    assert difference < 1e-3, "an adapter with B = 0 must not change the model"

    say(f"3. fine-tune on {len(train)} blocks of {LENGTH} tokens of the standard library's docstrings")
    first = held_out_loss(trained, held_out)
    text = complete(trained, tokenizer)
    fine_tune(trained, train)
    last = held_out_loss(trained, held_out)
    print(f"   loss on docstrings of modules it has not seen: {first:.3f} -> {last:.3f}")
    assert last < first - 0.05, "the held-out loss did not fall"
    print(f"   before: {text}\n   after:  {complete(trained, tokenizer)}")

    say("4. save the adapter, load it here and in PEFT")
    check_round_trip(model, trained, probe)

    say("5. the same model with each library (median time and ratio to the plain model; interleaved rounds)")
    show_times(model, held_out)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def answer(model, tokenizer, question):
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return generate(model, tokenizer, ids, 12)


def complete(model, tokenizer):
    return PROMPT.splitlines()[0] + " … " + repr(generate(model, tokenizer, tokenizer(PROMPT, return_tensors="pt"), 32))


def generate(model, tokenizer, ids, count):
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out_loss(model, blocks):
    with torch.no_grad():
        losses = [model(part, labels=part, use_cache=False).loss.item() for part in blocks[:16].split(BATCH)]
    return sum(losses) / len(losses)


def fine_tune(model, blocks):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    start, average = time.perf_counter(), None
    model.train()
    for step, batch in enumerate(blocks[: STEPS * BATCH].split(BATCH), 1):
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.8 * average + 0.2 * loss.item()
        progress(step, STEPS, f"loss {average:.3f}  {(time.perf_counter() - start) / step:.2f} s/step", 10)
    model.eval()


def check_round_trip(model, trained, probe):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        fastlora.save_adapter(trained, folder)
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
        print(f"   {', '.join(sorted(f.name for f in Path(folder).iterdir()))}: {size / 1e6:.1f} MB")
        expected = trained(probe).logits
        again = fastlora.load_adapter(models.twin(model), folder).eval()
        in_peft = peft.PeftModel.from_pretrained(models.twin(model), folder).eval()
        for name, loaded in (("fastlora", again), ("PEFT", in_peft)):
            difference = (loaded(probe).logits - expected).abs().max().item()
            print(f"   loaded by {name}: largest difference of a logit {difference:.1e}")
            assert difference < 1e-3, f"{name} computes something else from the saved adapter"


def show_times(model, blocks):
    adapted = {m: steps.randomize(models.adapted(model, m)) for m in METHODS}
    forward, prompt = blocks[:BATCH], blocks[:1, :64]
    print("   " + f"{'':22}" + "".join(f"{m:>20}" for m in METHODS))
    with torch.inference_mode():
        calls = {m: (lambda net=net: net(forward, use_cache=False)) for m, net in adapted.items()}
        show_row(f"forward, {forward.numel()} tokens", clock.time_cpu(calls, seconds=3, rounds=(4, 20)))
        calls = {m: steps.decode_step(net, prompt) for m, net in adapted.items()}
        show_row("decode one token", clock.time_cpu(calls, seconds=3, rounds=(10, 50)))
    calls = {m: steps.training_step(net, forward) for m, net in adapted.items()}
    show_row("forward + backward", clock.time_cpu(calls, seconds=5, rounds=(3, 10)))


def show_row(name, timing):
    cells = [f"{timing.quantiles(m)[1] * 1e3:.1f} ms ({timing.ratio(m, 'base'):.2f}x)" for m in METHODS]
    print(f"   {name:22}" + "".join(f"{c:>20}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
