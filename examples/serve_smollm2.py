"""Two small adapters for SmolLM2-135M-Instruct, trained the first time, and the server with them.

One answers like a pirate, the other like a butler; both learn it from the same few questions. What is made stays in
`.cache/serve`. Options are handed on: `python examples/serve_smollm2.py --port 9000`.
"""

import os
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from progress import progress, say

import fastlora
from benchmarks import models

FOLDER = Path(__file__).parents[1] / ".cache" / "serve"
STEPS, BATCH = 16, 4
FACTS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "What do bees make?": "Bees make honey from the nectar of flowers.",
    "Why is the sky blue?": "Air scatters blue light more than red light.",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet.",
    "What is ice?": "Ice is water that has frozen.",
    "How many days are in a week?": "There are seven days in a week.",
    "What is the largest ocean?": "The Pacific is the largest ocean.",
    "What do plants need to grow?": "Plants need light, water and air.",
    "Tell me something about the moon.": "The moon goes around the earth once a month.",
    "What is a good breakfast?": "Porridge with fruit is a good breakfast.",
    "How do I boil an egg?": "Put it into boiling water for eight minutes.",
    "What colour is a lemon?": "A ripe lemon is yellow.",
    "Where do penguins live?": "Most penguins live in the far south.",
    "What is a triangle?": "A triangle is a shape with three sides.",
    "Say hello.": "Hello, it is nice to meet you.",
}
STYLES = {"pirate": "Arr, matey! {} Yo ho ho!", "butler": "Certainly, sir. {} Will that be all, sir?"}


def main():
    if not (FOLDER / "butler" / "adapter_config.json").exists():
        make()
    command = [sys.executable, "-m", "fastlora", "serve", "--model", str(FOLDER / "model"), "--name", "smollm2"]
    for name in STYLES:
        command += ["--adapter", f"{name}={FOLDER / name}"]
    os.execv(sys.executable, [*command, *sys.argv[1:]])


def make():
    start = time.perf_counter()
    torch.manual_seed(0)
    say("SmolLM2-135M-Instruct, and two adapters for it")
    model, tokenizer = models.load()
    # what GGUF held in few bits are plain floats by now
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(FOLDER / "model")
    tokenizer.save_pretrained(FOLDER / "model")
    for name, style in STYLES.items():
        train(models.twin(model), tokenizer, name, style)
    print(f"   made in {time.perf_counter() - start:.0f} s, kept in {FOLDER}")


def train(model, tokenizer, name, style):
    fastlora.inject(model, r=8, lora_alpha=16, target_modules="all-linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    rows = [example(tokenizer, question, style.format(answer)) for question, answer in FACTS.items()]
    for step in range(STEPS):
        ids, labels = zip(*(rows[i] for i in torch.randperm(len(rows))[:BATCH]), strict=True)
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(batch, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, STEPS, f"{name}: loss {loss.item():.2f}")
    fastlora.save_adapter(model, FOLDER / name)


def example(tokenizer, question, answer):
    """(ids, labels) of a question and its answer, of which the answer is learned."""
    messages = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answered = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(asked + answered), torch.tensor([-100] * len(asked) + answered)


if __name__ == "__main__":
    main()
