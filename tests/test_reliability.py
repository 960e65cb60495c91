"""What a long run meets: memory, kills, full disks, restarts, threads and forks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import hydra_kernels as hk

from . import soak
from .oracle import hydra

F32, F64 = torch.float32, torch.float64
NATIVE = hk.backends()["native"] is None
BACKENDS = ["aten"] + (["native"] if NATIVE else [])
NAMES = ("x", "weight", "bias", "A_down", "A_up", "B_down", "B_up")
ROOT = Path(__file__).parent.parent


def trained(layer: hk.HydraLinear, seed: int = 0) -> hk.HydraLinear:
    """The layer with every adapter drawn, none of them zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.adapters().values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return layer


def layer_of(method: str = "hydra", K: int = 6, N: int = 5, seed: int = 0, **options) -> hk.HydraLinear:
    torch.manual_seed(seed)
    kinds = {"hydra": hk.HydraLinear, "lora": hk.LoRALinear, "seqlora": hk.SeqLoRALinear}
    ranks = {"r_a": 2, "r_b": 3} if method == "hydra" else {"r": 3}
    return trained(kinds[method](K, N, **ranks, **options), seed)


def oracle_of(layer: hk.HydraLinear, x: torch.Tensor, **replaced: torch.Tensor) -> torch.Tensor:
    """h in float64."""
    t = {name: replaced.get(name, getattr(layer, name, None)) for name in NAMES[1:]}
    return hydra({name: v.double() for name, v in {"x": x, **t}.items() if v is not None})


def assert_is(got: torch.Tensor, true: torch.Tensor) -> None:
    """float32 within a few roundings of a float64 truth of order one."""
    torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh interpreter that runs code, with the arguments in sys.argv[1:]."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], timeout: float = 120) -> dict:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


# Memory


def grown_memory(steps: int) -> None:
    """What leaks, as the package is, and with one [M, R] tensor more a step, which is also one small Python object."""
    torch.set_num_threads(1)
    kept = []
    clean = soak.leaks(soak.growth(steps), steps)
    planted = soak.leaks(soak.growth(steps, lambda: kept.append(torch.ones(soak.M, soak.R))), steps)
    print(json.dumps({"clean": clean, "planted": [said.partition(" ")[0] for said in planted]}))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [480])
def test_memory_is_flat_and_a_leak_would_show(steps):
    """In a process of its own: other tests leave caches that come and go."""
    found = answer(python(f"from tests.test_reliability import grown_memory; grown_memory({steps})"))
    assert found == {"clean": [], "planted": ["resident", "blocks", "tensors"]}


# Saving


def kill_saves(folder: str, kills: int) -> None:
    """Forks a child that saves two versions in turn and kills it at a random moment, often; prints what it found.

    Every other kill waits for an unfinished file, which on a fast disk is there for a small part of the time.
    """
    torch.set_num_threads(1)  # a fork must copy no thread pool
    path = Path(folder, "adapters")
    versions = [nn.Sequential(layer_of(K=400, N=300, seed=seed)) for seed in (1, 2)]
    target = nn.Sequential(layer_of(K=400, N=300, seed=3))
    hk.save_adapters(versions[0], path)
    start = time.monotonic()
    for version in versions * 5:
        hk.save_adapters(version, path)
    duration = (time.monotonic() - start) / 10
    draw, seen, unfinished = random.Random(0), [0, 0], 0
    for number in range(kills):
        ready, started = os.pipe()
        order = draw.sample(versions, 2)
        child = os.fork()
        if child == 0:
            os.write(started, b".")
            while True:
                for version in order:
                    hk.save_adapters(version, path)
        os.read(ready, 1)
        os.close(ready)
        os.close(started)
        time.sleep(draw.uniform(0.5, 4) * duration)
        until = time.monotonic() + 0.5
        while number % 2 and not any(path.parent.glob(".adapters.*")) and time.monotonic() < until:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        hk.load_adapters(target, path)
        loaded = hk.adapter_state_dict(target)
        equal = [all(torch.equal(loaded[k], v) for k, v in hk.adapter_state_dict(m).items()) for m in versions]
        assert sum(equal) == 1, "neither of the two versions"
        seen[equal.index(True)] += 1
        for left in path.parent.glob(".adapters.*"):
            unfinished += 1
            left.unlink()
    print(json.dumps({"seen": seen, "unfinished": unfinished}))


@pytest.mark.slow
def test_a_killed_save_leaves_one_of_the_two_versions(tmp_path):
    code = "import sys; from tests.test_reliability import kill_saves; kill_saves(sys.argv[1], int(sys.argv[2]))"
    found = answer(python(code, tmp_path, 200))
    assert sum(found["seen"]) == 200
    assert min(found["seen"]) > 20, "both versions are found"
    assert found["unfinished"] > 20, "the kills land inside the writing"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """No file may grow beyond a kilobyte: the write itself fails, as on a full disk."""
    path = tmp_path / "a"
    hk.save_adapters(layer_of(), path)
    old = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            hk.save_adapters(layer_of(K=64, N=64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    hk.save_adapters(layer_of(), tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            hk.save_adapters(layer_of(seed=1), tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "a").read_bytes() == old
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_kept_and_what_it_points_to_replaced(tmp_path, dangling):
    target, link = tmp_path / "real" / "a", tmp_path / "links" / "latest"
    target.parent.mkdir()
    link.parent.mkdir()
    link.symlink_to(os.path.join("..", "real", "a"))
    if not dangling:
        hk.save_adapters(layer_of(seed=1), target)
    hk.save_adapters(layer_of(seed=2), link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert os.listdir(tmp_path / "links") == ["latest"]
    assert os.listdir(tmp_path / "real") == ["a"]
    loaded = layer_of(seed=3)
    hk.load_adapters(loaded, target)
    assert torch.equal(loaded.A_down, layer_of(seed=2).A_down)


def test_saves_at_once_leave_one_of_them(tmp_path):
    layers = [layer_of(K=64, N=64, seed=seed) for seed in range(4)]
    target = layer_of(K=64, N=64, seed=9)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            list(pool.map(lambda layer: hk.save_adapters(layer, tmp_path / "a"), layers))
            hk.load_adapters(target, tmp_path / "a")
            same = [all(torch.equal(v, t.adapters()[k]) for k, v in target.adapters().items()) for t in layers]
            assert sum(same) == 1
    assert os.listdir(tmp_path) == ["a"]


def test_adapters_that_two_layers_share_are_stored_once(tmp_path):
    def model(seed):
        a, b = layer_of(seed=seed), layer_of(seed=seed + 10)
        b.A_down = a.A_down
        return nn.ModuleList([a, b])

    source, target = model(1), model(2)
    hk.save_adapters(source, tmp_path / "a")
    hk.load_adapters(target, tmp_path / "a")
    assert target[1].A_down is target[0].A_down
    for loaded, saved in zip(target, source, strict=True):
        assert all(torch.equal(v, saved.adapters()[k]) for k, v in loaded.adapters().items())
    with pytest.raises(ValueError, match=r"1.A_down: missing in the file"):
        hk.load_adapters(nn.ModuleList([layer_of(), layer_of()]), tmp_path / "a")


# Restarts


def digests(seed: int) -> dict[str, str]:
    """A digest of loss and gradients of two steps, by method and backend, with dropout."""
    torch.set_num_threads(1)
    found = {}
    for method in ("hydra", "lora", "seqlora"):
        for backend in BACKENDS:
            layer = layer_of(method, 32, 24, dropout=0.3, backend=backend)
            torch.manual_seed(seed)
            x = torch.ones(64, 32)
            for _ in range(2):
                loss = layer(x).square().mean()
                loss.backward()
            bits = [loss.detach(), *(p.grad for p in layer.adapters().values())]
            found[f"{method} {backend}"] = hashlib.sha256(b"".join(t.numpy().tobytes() for t in bits)).hexdigest()
    return found


def restart(path: str) -> None:
    """What a fresh process makes of seeds 1 and 2, and of a pickled layer."""
    layer, x = pickle.loads(Path(path).read_bytes())
    print(json.dumps({"seeds": [digests(1), digests(2)], "pickled": layer(x).tolist()}))


def test_a_restart_gives_the_same_bits_and_takes_a_pickled_layer(tmp_path):
    layer, x = layer_of(), torch.randn(4, 6)
    (tmp_path / "layer").write_bytes(pickle.dumps((layer, x)))
    code = "import sys; from tests.test_reliability import restart; restart(sys.argv[1])"
    processes = [python(code, tmp_path / "layer") for _ in range(2)]
    first, second = (answer(process) for process in processes)
    assert first == second
    ones, twos = first["seeds"]
    assert all(ones[key] != twos[key] for key in ones)
    assert_is(torch.tensor(first["pickled"]), oracle_of(layer, x).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restored_generator_continues(backend):
    layer, x = layer_of(dropout=0.5, backend=backend), torch.randn(64, 6)
    layer(x)
    state = torch.get_rng_state()
    after = [layer(x) for _ in range(3)]
    torch.set_rng_state(state)
    assert all(torch.equal(layer(x), h) for h in after)
    assert not torch.equal(after[0], after[1])


# Threads and processes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_threads_get_the_bits_of_a_single_one(backend, form):
    """Of one layer and of several; every second thread evaluates without gradients while the others train."""
    layers = [layer_of(K=96, N=80, seed=seed, backend=backend, form=form) for seed in (0, 0, 1, 2)]
    layers[1] = layers[0]
    inputs = [torch.randn(64, 96) for _ in layers]

    def work(i: int) -> list[torch.Tensor]:
        torch.set_num_threads(1)
        layer, x = layers[i % 4], inputs[i % 4].clone().requires_grad_()
        if i >= 4:
            with torch.no_grad() if i % 2 else torch.inference_mode():
                return [layer(x)]
        h = layer(x)
        return [h.detach(), *torch.autograd.grad(h.square().sum(), [x, *layer.adapters().values()])]

    alone = [work(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for results in [list(pool.map(work, range(8))) for _ in range(10)]:
            for got, want in zip(results, alone, strict=True):
                assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert_is(alone[2][0], oracle_of(layers[2], inputs[2]).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_threads_may_change_before_the_backward(backend):
    layer, x = layer_of(K=64, N=48, backend=backend), torch.randn(512, 64, requires_grad=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        h = layer(x)
        torch.set_num_threads(1)
        (dx,) = torch.autograd.grad(h.sum(), x)
    finally:
        torch.set_num_threads(before)
    x64 = x.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(oracle_of(layer, x64).sum(), x64)
    assert_is(dx, true)


class Encoded(torch.utils.data.Dataset):
    """Items that a DataLoader's worker sends through a layer."""

    def __init__(self, layer: nn.Module, x: torch.Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(self.x[i])


def forked_workers() -> None:
    """DataLoader workers forked after this process has used its threads in a forward and a backward."""
    torch.set_num_threads(2)
    worst = 0.0
    for backend in BACKENDS:
        layer = layer_of(K=96, N=80, backend=backend)
        x = torch.randn(4, 512, 96)
        layer(x).sum().backward()
        loader = torch.utils.data.DataLoader(Encoded(layer, x), num_workers=2, batch_size=2, timeout=30)
        worst = max(worst, (torch.cat(list(loader)).double() - oracle_of(layer, x)).abs().max().item())
    print(json.dumps({"worst": worst}))


@pytest.mark.slow
def test_workers_forked_after_the_threads_were_used():
    code = "from tests.test_reliability import forked_workers; forked_workers()"
    assert answer(python(code))["worst"] < 1e-4
