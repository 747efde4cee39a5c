"""Real text that is on every machine: functions of the standard library with their docstrings."""

import ast
import random
import sysconfig
import zlib
from pathlib import Path

import torch


def functions():
    """Yield (module name, source of a signature with its docstring) of the library's modules, in a fixed order."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text:
                body = text.replace("\n", "\n    ")
                yield file.stem, f'def {node.name}({ast.unparse(node.args)}):\n    """{body}\n    """\n\n'


def token_blocks(tokenizer, length):
    """(training, held-out) blocks (count, length) of token ids; every eighth module is held out."""
    parts = {False: [], True: []}
    for module, text in functions():
        parts[zlib.crc32(module.encode()) % 8 == 0].append(text)
    return tuple(_blocks(tokenizer, parts[held_out], length) for held_out in (False, True))


def _blocks(tokenizer, texts, length):
    random.Random(0).shuffle(texts)
    ids = tokenizer("".join(texts), verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
