"""transformers' models and our own, through torch.compile."""

from __future__ import annotations

import functools

import pytest
import torch

import kexaone
from kexaone.graph.backend import backend
from kexaone.graph.passes import Report, identity, suite

from .families import FAMILIES, LAYERS

# float32 results of a few hundred operations in another order: some 100 x 2^-24 apart; a wrong
# replacement changes the first digit
CLOSE = 1e-4


def compiled(function, reports: list[Report], **options):
    run = functools.partial(backend, options={"then": "eager"}, reports=reports)
    return torch.compile(function, backend=run, fullgraph=True, **options)


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randint(1, 97, (batch, length), generator=generator)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_a_family(name):
    family, reports, ids = FAMILIES[name], [], tokens(2, 24)
    model = family.build()
    with torch.no_grad():
        ours = compiled(model, reports)(ids, use_cache=False).logits
        assert distance(ours, model(ids, use_cache=False).logits) < CLOSE
    (report,) = reports
    assert report.whole == "" and report.matches == family.found


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_training_steps_of_any_size_share_one_graph():
    model, reports = FAMILIES["ExaoneMoe"].build(), []

    def step(ids):
        return model(ids, labels=ids, use_cache=False).loss

    fast = compiled(step, reports, dynamic=True)
    for size in ((2, 24), (3, 17), (2, 40)):
        ids = tokens(*size)
        loss = step(ids)
        expected = gradients(model, loss)
        ours = fast(ids)
        found = gradients(model, ours)
        assert distance(ours, loss) < CLOSE and found.keys() == expected.keys()
        worst = max(distance(found[n], g) for n, g in expected.items())
        assert worst < CLOSE
    (report,) = reports
    assert report.matches == FAMILIES["ExaoneMoe"].found | {"cross_entropy": 1}
    assert not report.refusals


def test_looped_experts_are_replaced_above_the_graph():
    model, ids = FAMILIES["ExaoneMoe"].build(), tokens(2, 24)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        ours = kexaone.optimize(model, then="eager")(ids, use_cache=False).logits
    assert distance(ours, expected) < CLOSE
    assert model.config._experts_implementation == "kexaone"


def test_padded_batches_through_the_hooks():
    kexaone.register_with_transformers()
    model, ids = FAMILIES["ExaoneMoe"].build(), tokens(3, 24)
    real = torch.ones_like(ids)
    real[0, :5], real[1, 20:] = 0, 0
    with torch.no_grad():
        expected = model(ids, attention_mask=real, use_cache=False).logits
        model.set_attn_implementation("kexaone")
        model.set_experts_implementation("kexaone")
        ours = model(ids, attention_mask=real, use_cache=False).logits
        left = model.generate(ids[:1], attention_mask=real[:1], max_new_tokens=12, do_sample=False)
        model.set_attn_implementation("sdpa")
        plain = model.generate(ids[:1], attention_mask=real[:1], max_new_tokens=12, do_sample=False)
    chosen = real.bool()
    assert ours.isfinite().all() and distance(ours[chosen], expected[chosen]) < CLOSE
    assert torch.equal(left, plain)


def test_inductor_and_the_registered_name():
    model, ids = FAMILIES["ExaoneMoe"].build(), tokens(2, 24)
    fast = torch.compile(model.model.layers[0].mlp, backend="kexaone", fullgraph=True)
    x = torch.randn(3, 64, requires_grad=True)
    assert distance(fast(x), model.model.layers[0].mlp(x)) < CLOSE
    fast(x).sum().backward()
    assert x.grad is not None and ids.numel()


def test_a_changed_pass_changes_the_cache_key(monkeypatch, tmp_path):
    from kexaone.graph import passes, shim

    before = identity()
    for file in (kexaone_graph := __import__("pathlib").Path(passes.__file__).parent).glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "swiglu.py").write_text((kexaone_graph / "swiglu.py").read_text() + "\n")
    monkeypatch.setattr(passes, "__file__", str(tmp_path / "passes.py"))
    identity.cache_clear()
    after = identity()
    monkeypatch.undo()
    identity.cache_clear()
    assert before == identity() != after
    with shim.cache_key(after):
        assert after in torch.compiler.config.cache_key_tag
    assert after not in torch.compiler.config.cache_key_tag


def test_what_cannot_be_captured_runs_as_it_is():
    reports: list[Report] = []

    def function(x):
        return x[x > 0].sum()

    run = functools.partial(backend, options={"then": "eager"}, reports=reports)
    x = torch.arange(-3.0, 4.0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.compile(function, backend=run)(x) == 6
    assert all(report.whole or not report.matches for report in reports)


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="then takes one of inductor, eager, got 'fast'"):
        kexaone.optimize(torch.nn.Linear(2, 2), then="fast")


def test_every_pass_has_its_file_and_contract():
    for step in suite():
        assert step.expected and step.name in (step.anchor.__module__.rsplit(".", 1)[-1],)
    assert LAYERS > 1
