"""Adapters that come and go: pages, leases, eviction, replacement, and what is refused."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora import Route, lora_routed, serve
from fastlora.serve.pages import pages_for


@pytest.fixture
def pool(tiny):
    pool = serve.AdapterPool(tiny.make().requires_grad_(False), adapters=2, max_rank=32)
    for name in ("fr", "de", "it"):
        pool.load(name, tiny.adapters / name)
    return pool


def image(pool, slot, layer="model.layers.0.self_attn.q_proj"):
    """What a slot does on a layer."""
    weight, pages = pool.layers[layer].weight, pool.pages(layer)
    x = torch.eye(weight.shape[1])
    return lora_routed(x, torch.zeros_like(weight), pages, None, Route.from_rows([[(slot, 1.0)]], [0] * len(x)))


def delta(folder, layer="base_model.model.model.layers.0.self_attn.q_proj"):
    """The same from the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return 2 * (tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]).T


def used(pool):
    return {name: list(arena.free) for name, arena in pool.arenas.items()}, pool.names(), pool.evictions


def test_pages_are_reused_and_leak_nothing(tiny, pool):
    assert pool.page_count == 4 and pool.used_pages() == 0
    with_it = pool.acquire("it")
    torch.testing.assert_close(image(pool, with_it.entries[0][0]), delta(tiny.adapters / "it"))
    slot = with_it.entries[0][0]
    with_it.release()
    pool.unload("it")
    assert pool.used_pages() == 0 and not image(pool, slot).any()
    fr, de = pool.acquire("fr"), pool.acquire("de")
    for lease, name in ((fr, "fr"), (de, "de")):
        torch.testing.assert_close(image(pool, lease.entries[0][0]), delta(tiny.adapters / name))


def test_the_least_recently_used_leaves(pool):
    leases = {name: pool.acquire(name) for name in ("fr", "it")}
    leases["it"].release()
    pool.acquire("fr").release()
    pool.acquire("de")
    pool.load("big", _tensors(17))
    with pytest.raises(serve.PoolFull, match="'big'"):
        pool.pin("big")
    assert pool.evictions == 0, "nothing leaves in vain"
    leases["fr"].release()
    pool.pin("big")
    assert pool.evictions == 2
    pool.unload("big")
    assert pool.acquire("it").entries[0][1] == 1.0


def test_pinned_adapters_stay(pool):
    pool.pin("fr")
    pool.pin("de")
    pool.pin("it")
    pool.load("big", _tensors(17))
    with pytest.raises(serve.PoolFull):
        pool.pin("big")
    pool.unpin("it")
    pool.unpin("fr")
    pool.pin("big")
    assert pool.evictions == 2


def test_unload_and_replace_wait_for_leases(tiny, pool):
    old = pool.acquire("fr")
    slot = old.entries[0][0]
    pool.replace("fr", tiny.adapters / "de")
    new = pool.acquire("fr")
    assert new.key != old.key and new.entries[0][0] != slot
    torch.testing.assert_close(image(pool, slot), delta(tiny.adapters / "fr"))
    torch.testing.assert_close(image(pool, new.entries[0][0]), delta(tiny.adapters / "de"))
    pool.unload("fr")
    with pytest.raises(KeyError, match="'fr'"):
        pool.acquire("fr")
    before = pool.used_pages()
    old.release()
    old.release()
    assert pool.used_pages() < before and not image(pool, slot).any()
    new.release()
    assert pool.used_pages() == 0


def test_leases_of_several(pool):
    assert pool.acquire(None).entries == () and pool.acquire(None).key == ()
    lease = pool.acquire({"fr": 0.25, "de": -1})
    assert [weight for _, weight in lease.entries] == [0.25, -1.0]
    assert lease.key != pool.acquire({"fr": 0.5, "de": -1}).key
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="'fr'"):
            pool.acquire({"fr": bad})
    with pytest.raises(KeyError, match="'nobody'.*'fr'"):
        pool.acquire({"fr": 1.0, "nobody": 1.0})


def test_threads(pool):
    failures = []

    def work(name):
        try:
            for _ in range(200):
                try:
                    lease = pool.acquire(name)
                except serve.PoolFull:
                    continue
                assert lease.entries[0][0] is not None
                lease.release()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("fr", "de", "it", "fr")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all(h.leases == 0 for h in pool._names.values())


def test_what_each_takes(tiny, pool):
    layers = 2 * len(("q", "k", "v", "o", "gate", "up", "down"))
    same = {"place": "host", "pinned": False, "leases": 0, "trained": False}
    ranks = {"fr": 4, "de": 8, "it": 12}
    assert pool.info() == {n: {"ranks": [r], "pages": layers * -(-r // 8), **same} for n, r in ranks.items()}
    lease = pool.acquire({"fr": 0.5, "de": 0.5})
    pool.pin("de")
    pool.create("new", 3, target_modules=["q_proj"])
    info = pool.info()
    assert [info[n]["place"] for n in info] == ["device", "device", "host", "device"]
    assert [info[n]["leases"] for n in info] == [1, 1, 0, 0] and [info[n]["pinned"] for n in info] == [0, 1, 0, 1]
    assert info["new"] == {"ranks": [3], "pages": 0, **same, "place": "device", "pinned": True, "trained": True}
    assert sum(one["pages"] for one in info.values() if one["place"] == "device") == pool.used_pages()
    lease.release()
    assert pool.info()["fr"]["leases"] == 0


@torch.no_grad()
def test_a_layer_s_pages_are_those_of_a_direct_call(tiny):
    """`lora_routed` with `pool.pages(layer)` and leases' entries is what the attached layer does."""
    model = tiny.make().requires_grad_(False)
    pool = serve.attach(model, adapters=4, max_rank=32)
    pages = pool.pages("model.layers.1.mlp.up_proj")
    for name in ("fr", "it"):
        pool.load(name, tiny.adapters / name)
    layer, x = model.model.layers[1].mlp.up_proj, torch.randn(3, 5, 32)
    leases = [pool.acquire(spec) for spec in ("it", None, {"fr": 0.5, "it": -1.0})]
    route = Route.from_lists([lease.entries for lease in leases for _ in range(5)])
    direct = lora_routed(x, layer.weight, pages, None, route, layer.bias)
    with serve.adapters(model, ["it", None, {"fr": 0.5, "it": -1.0}]):
        torch.testing.assert_close(direct, layer(x))
    update = direct - torch.nn.functional.linear(x, layer.weight)
    assert update[1].abs().max() < 1e-5 and all(update[i].abs().max() > 0.1 for i in (0, 2))
    assert pool.pages("model.layers.1.mlp.up_proj") is pages
    with pytest.raises(KeyError, match="model.norm"):
        pool.pages("model.norm")


def test_memory_follows_the_ranks(tiny):
    """100 adapters, 90 of rank 8 and 10 of rank 64, against room for 100 of the highest rank."""
    pool = serve.AdapterPool(tiny.make(), adapters=100, max_rank=64)
    for i in range(100):
        pool.load(str(i), _tensors(64 if i < 10 else 8), pin=True)
    arena = pool.arenas["model.layers.0.mlp.up_proj"]
    assert pool.nbytes() / (100 * pages_for(64, False) * arena.page_bytes) < 0.22


def _tensors(r, layer="model.layers.0.mlp.up_proj"):
    return {f"{layer}.lora_A": torch.ones(r, 32), f"{layer}.lora_B": torch.ones(64, r)}


def _damaged(tiny, root, change):
    """A copy of an adapter's folder after `change(config, tensors)`, which may return the file's bytes."""
    source = tiny.adapters / "fr"
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    data = change(config, tensors)
    (root / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, root / "adapter_model.safetensors")
    if data:
        path = root / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:data])
    return root


def _nan(config, tensors):
    next(iter(tensors.values()))[0] = float("nan")


def _wide(config, tensors):
    for name, tensor in tensors.items():
        tensors[name] = torch.zeros(*(n * 2 if n == 32 else n for n in tensor.shape))


@pytest.mark.parametrize(
    "change",
    [
        _nan,
        _wide,
        lambda config, tensors: 100,
        lambda config, tensors: tensors.update(extra=torch.zeros(1)),
        lambda config, tensors: tensors.update({"base_model.model.other.lora_A.weight": torch.zeros(4, 32)}),
        lambda config, tensors: config.update(use_qalora=True),
        lambda config, tensors: config.update(peft_type="IA3"),
        lambda config, tensors: config.update(modules_to_save=["lm_head"]),
    ],
)
def test_bad_files_change_nothing(tiny, pool, tmp_path, change):
    pool.pin("fr")
    before = used(pool)
    folder = _damaged(tiny, tmp_path, change)
    for call in (lambda: pool.load("bad", folder), lambda: pool.replace("fr", folder)):
        with pytest.raises(Exception, match=".") as error:
            call()
        assert not isinstance(error.value, (KeyError, AttributeError, TypeError, IndexError))
    assert used(pool) == before


def test_refusals(tiny, pool):
    before = used(pool)
    for name in ("", "a*b", "a+b", "a:b", " ", 3, "a\0b"):
        with pytest.raises(ValueError, match="fastlora: name"):
            pool.load(name, tiny.adapters / "fr")
    with pytest.raises(ValueError, match="fastlora: name: got 'fr'"):
        pool.load("fr", tiny.adapters / "fr")
    with pytest.raises(ValueError, match="max_rank"):
        pool.load("high", _tensors(40))
    with pytest.raises(KeyError, match="nobody"):
        pool.unload("nobody")
    with pytest.raises(ValueError, match="made by create"):
        pool.parameters("fr")
    with pytest.raises(ValueError, match="target_modules"):
        pool.create("new", 4, target_modules=["nothing"])
    with pytest.raises(FileNotFoundError):
        pool.load("none", tiny.root / "nowhere")
    assert used(pool) == before
    for options in ({"adapters": 0}, {"bytes": 10}, {"max_rank": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            serve.AdapterPool(tiny.make(), **options)


def test_pickles_only_on_request(tiny, pool, tmp_path):
    source = tiny.adapters / "fr"
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    torch.save(load_file(source / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError):
        pool.load("pickled", tmp_path)
    pool.load("pickled", tmp_path, unsafe=True)
    torch.testing.assert_close(image(pool, pool.acquire("pickled").entries[0][0]), delta(source))


def test_what_finds_no_room_is_not_there(tiny, pool):
    """`load(pin=True)` and `replace` of a pinned adapter that is in use leave the pool as it was."""
    pool.load("big", _tensors(16), pin=True)
    lease = pool.acquire("big")
    before = used(pool)
    with pytest.raises(serve.PoolFull):
        pool.load("new", _tensors(24), pin=True)
    with pytest.raises(serve.PoolFull):
        pool.replace("big", _tensors(24))
    assert used(pool) == before and pool.acquire("big").key == lease.key
    with pytest.raises(KeyError):
        pool.acquire("new")


def test_a_pinned_adapter_makes_room_for_its_successor(pool):
    pool.load("big", _tensors(32), pin=True)
    old = pool._names["big"]
    pool.replace("big", _tensors(24))
    new = pool._names["big"]
    assert new is not old and new.pinned and new.slot is not None and old.slot is None
    assert len(pool.arenas["model.layers.0.mlp.up_proj"].free) == 1


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10**400])
def test_scales_are_finite(tiny, pool, tmp_path, alpha):
    folder = _damaged(tiny, tmp_path, lambda config, tensors: config.update(lora_alpha=alpha))
    with pytest.raises(ValueError, match="lora_alpha"):
        pool.load("bad", folder)
