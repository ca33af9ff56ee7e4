"""The Triton kernels against plain PyTorch, under Triton's interpreter on the CPU.

Float32 throughout: the interpreter multiplies bfloat16 wrongly. bfloat16 on a real GPU is in test_cuda.py.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from memories import assert_same

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from fastmem_pl import Memorizer, kernels
from fastmem_pl.backbone import GradientFactors
from fastmem_pl.backbone.ffn import DeltaProduct
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.kernels import adamw, gate, loss
from fastmem_pl.memory.delta import DeltaAdamW

STRONG = {"steps": 4, "learning_rate": 1e-3, "kl_coeff": 0.3}


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels need CUDA tensors: test_cuda.py"
)


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(7, 5, 3), (70, 330, 70), (1, 64, 200), (adamw._STORED_FROM, 5, 2100)],
)
def test_adamw_is_adamw(monkeypatch, tokens, rows, columns, from_zero):
    torch.manual_seed(0)
    samples, decay = 5, 0.05
    rates = [0.01, 0.02, 0.01, 0.005, 0.03]
    base = torch.randn(columns, rows).t()  # as GPT-2 keeps it
    weights = [(base + (0.0 if from_zero else 0.3)).contiguous().requires_grad_(True) for _ in range(samples)]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    reference = torch.optim.AdamW(groups, weight_decay=decay)
    start = 0.0 if from_zero else 0.3
    delta = torch.nn.Parameter(torch.full((samples, rows, columns), start))
    optimizer = DeltaAdamW([(delta, base)], rates, decay, last_step=4, from_zero=from_zero)
    launches = []
    monkeypatch.setattr(adamw, "_factored_adamw", _Spy(adamw._factored_adamw, launches))
    for step in range(4):
        inner = torch.randn(samples, tokens, columns)
        delta.factors = GradientFactors((5.0 if step else 0.01) * torch.randn(samples, tokens, rows), inner)
        for row, weight in enumerate(weights):
            weight.grad = delta.factors.outer[row].t() @ inner[row]
            torch.nn.utils.clip_grad_norm_(weight, 3.0)
        reference.step()
        optimizer.clip(3.0)
        optimizer.step()
        optimizer.zero_grad()
        for row, weight in enumerate(weights):
            # Where a gradient is near 0, rounding decides how far Adam goes, lr at most.
            error = base + delta[row].detach() - weight.detach()
            assert error.abs().max() < rates[row] / 10
            assert error.norm() < 1e-3 * (delta[row].detach() - start).norm()
    # Stored gradients are formed for four samples at a time.
    assert len(launches) == 4 * (2 if tokens >= adamw._STORED_FROM else 1)
    delta.factors = GradientFactors(torch.randn(samples, tokens, rows), inner)
    with pytest.raises(FastMemError, match="memorizing ends after its 4 steps"):
        optimizer.step()


def test_gate_is_its_formula():
    torch.manual_seed(0)
    given = [torch.randn(3, 7, 50, requires_grad=i > 1) for i in range(4)]
    base_gate, base_up, gate_change, up_change = given
    found = gate.GatedChange.apply(*given)
    hidden = F.silu(base_gate + gate_change) * (base_up + up_change)
    expected = hidden, hidden - F.silu(base_gate) * base_up
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    upstream = [torch.randn_like(hidden) for _ in range(2)]
    torch.testing.assert_close(
        torch.autograd.grad(found, given[2:], upstream),
        torch.autograd.grad(expected, given[2:], upstream),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("vocabulary", [50, 9000])
@pytest.mark.parametrize("size", [0.0, 3.0])
def test_loss_is_its_formula(vocabulary, size):
    torch.manual_seed(0)
    raw = 5 * torch.randn(4, vocabulary)
    change = size * torch.randn(4, vocabulary)
    labels = torch.randint(vocabulary, (4,))
    coeff, weights = torch.tensor([0.0, 0.1, 1.0, 0.3]), torch.tensor([0.5, 0.5, 1.0, 0.25])
    logits = (raw + change).requires_grad_(True)
    log_p, log_p0 = logits.log_softmax(-1), raw.log_softmax(-1)
    cross_entropy = F.nll_loss(log_p, labels, reduction="none")
    kl = (log_p0.exp() * (log_p0 - log_p)).sum(-1)
    (grad,) = torch.autograd.grad((weights * (cross_entropy + coeff * kl)).sum(), logits)
    found = loss.soft_target_loss_(change, raw, *loss.reference_normalizers(raw), labels, coeff, weights)
    torch.testing.assert_close(found, (cross_entropy.detach(), kl.detach()), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(change, grad, rtol=1e-4, atol=1e-7)
    if size == 0:
        assert found[1].tolist() == [0.0] * 4


@pytest.mark.parametrize(("family", "num_layers"), [("llama", 2), ("gemma2", 1), ("gpt2", 1), ("phi3", 2)])
def test_memorizing_with_kernels_is_memorizing_without(make_tiny, contexts, monkeypatch, family, num_layers):
    settings = {**STRONG, "num_layers": num_layers, "optimizer_state": "float32"}
    tiny, contexts = make_tiny(family), contexts[1:3]
    plain = Memorizer(tiny, **settings)(contexts)
    called = []
    monkeypatch.setattr(adamw, "_factored_adamw", _Spy(adamw._factored_adamw, called))
    monkeypatch.setattr(kernels, "usable", lambda device, dtype: True)
    found = Memorizer(tiny, **settings)(contexts)
    assert len(called) == len(found.deltas[0]) * STRONG["steps"] * num_layers
    assert [curve.kl[0] for curve in found.curves] == [0.0, 0.0]
    assert_same(found, plain)


def test_factors_do_not_accumulate(tiny):
    delta = torch.nn.Parameter(torch.zeros(1, 3, 4))
    delta.factors = None
    x = torch.randn(1, 2, 4)
    DeltaProduct.apply(x, delta).sum().backward()
    assert delta.grad is None
    with pytest.raises(RuntimeError, match="do not accumulate"):
        DeltaProduct.apply(x, delta).sum().backward()


class _Spy:
    """Counts launches of a kernel."""

    def __init__(self, kernel, called):
        self._kernel, self._called = kernel, called

    def __getitem__(self, grid):
        self._called.append(grid)
        return self._kernel[grid]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastmem_pl.kernels import adamw, gate, loss

def compile(kernel, types, **constants):
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(types), (names, types)
    source = ASTSource(kernel, dict(zip(names, types)), {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm

b, f, i, x = "*bf16", "*fp32", "i32", "fp32"
tiles = {False: {"BLOCK_M": 64, "BLOCK_N": 64}, True: {"BLOCK_M": 1, "BLOCK_N": 2048}}
for state in (b, f):
    for stored, tile in tiles.items():
        for first, last in ((True, False), (False, True)):
            types = [state, state, f, b, b, b, f, f, *[i] * 6, *[x] * 6]
            constants = {"STORED": stored, "FIRST": first, "LAST": last, "GROUP": 4, "BLOCK_T": 32}
            compile(adamw._factored_adamw, types, **constants, **tile)
compile(gate._forward, [b] * 6 + [i], BLOCK=1024)
compile(gate._backward, [b] * 8 + [i], BLOCK=1024)
compile(loss._reference, [b, f, f, i], BLOCK=4096)
compile(loss._soft_target, [b, b, f, f, "*i64", f, f, f, f, i], BLOCK=4096)
"""


def test_kernels_compile_for_a_gpu():
    # Without one: what the interpreter takes, the compiler may not.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
