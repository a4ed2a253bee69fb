"""Token gradients: the projections against one backward pass per token, and what must not change a value."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tiny_training import VOCAB, tiny_model
from trimtab.analyze.projections import orthonormal, random_directions
from trimtab.analyze.token_gradients import Parameters, TokenGradients, TokenRow, TokenValues, _norms
from trimtab.errors import UserError
from trimtab.train.config import LoraSettings
from trimtab.train.lora import attach
from trimtab.train.loss import logit_gradients

torch.set_num_threads(1)


def rows_of(*sizes: int, seed: int = 0) -> list[TokenRow]:
    """Rows of random ids; all but the first third of each is measured, in two groups."""
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        at = np.arange(max(1, size // 3), size)
        found.append(TokenRow(rng.integers(1, VOCAB, size), at, np.where(at < size // 2, 3, 4)))
    return found


def backwards(model: Any, rows: list[TokenRow], parameters: list[nn.Parameter]) -> np.ndarray:
    """The plain loop, on the model itself."""
    model.eval()
    found = []
    for row in rows:
        ids = torch.tensor(row.ids[None])
        losses = functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        for at in row.at:
            grads = torch.autograd.grad(losses[at - 1], parameters, retain_graph=True, allow_unused=True)
            found.append(sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5)
    return np.array(found)


def measure(model: Any, rows: list[TokenRow], parameters: Parameters = "all", **how: Any) -> TokenValues:
    return TokenGradients(model, parameters).measure(rows, **{"projections": 64, "seed": 1, **how})


def adapted() -> Any:
    model = attach(tiny_model(), LoraSettings(r=4, targets=("q_proj", "v_proj")), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at birth, and with it the gradient of A
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


# --- against one backward pass per token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_exact_norms_are_those_of_a_plain_loop_and_projections_come_near(tied: bool) -> None:
    model, rows = tiny_model(tie_word_embeddings=tied), rows_of(40, 30)
    plain = backwards(model, rows, list(model.parameters()))
    exact = measure(model, rows, exact=True)
    np.testing.assert_allclose(exact.grad_norm, plain, rtol=1e-4)
    assert exact.grad_se is not None and not exact.grad_se.any()
    near = measure(model, rows)
    assert near.grad_norm is not None and near.grad_se is not None
    off = near.grad_norm / plain - 1
    assert np.sqrt(np.mean(off**2)) < 0.10
    group = np.concatenate([row.group for row in rows])
    for one in (3, 4):
        assert abs(near.grad_norm[group == one].mean() / plain[group == one].mean() - 1) < 0.03
    # Its own standard errors tell how far off it is: about two thirds of the tokens within one, nearly all within three.
    apart = np.abs(near.grad_norm - plain) / near.grad_se
    assert 0.45 < np.mean(apart < 1) < 0.9 and np.mean(apart < 3.5) > 0.95


@pytest.mark.parametrize("guides", [0, 1, 3])
def test_squares_are_unbiased(guides: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), rows_of(9)
    exact = measure(model, rows, exact=True).grad_norm
    monkeypatch.setattr("trimtab.analyze.token_gradients._GUIDES", 240 // guides if guides else 241)
    found = measure(model, rows, projections=240)
    assert exact is not None and found.grad_norm is not None and found.grad_se is not None
    # A guide may hold the only token of its group: that one is exact.
    assert np.all(np.abs(found.grad_norm - exact) < 4 * found.grad_se + 1e-4 * exact)
    assert np.all(found.grad_se / exact < 1.4 / np.sqrt(2 * (240 - guides)))


def test_as_many_guides_as_tokens_leave_nothing_to_estimate() -> None:
    model, rows = tiny_model(), rows_of(14)
    found = measure(model, rows, projections=120)
    np.testing.assert_allclose(found.grad_norm, measure(model, rows, exact=True).grad_norm, rtol=5e-3)


def test_the_correction_takes_the_bias_of_the_root_away() -> None:
    z = np.random.default_rng(0).standard_normal((12, 100_000)) ** 2  # a norm of 1, by twelve projections
    norm, error = _norms(np.zeros(100_000), z.sum(0), (z**2).sum(0), 12)
    assert np.sqrt(z.mean(0)).mean() < 0.982 and abs(norm.mean() - 1) < 0.006
    assert error.mean() == pytest.approx(1 / np.sqrt(24), rel=0.15)
    one, unknown = _norms(np.ones(2), np.array([3.0, -2.0]), np.ones(2), 1)
    assert one.tolist() == [2.0, 0.0] and np.isnan(unknown).all()


# --- closed forms --------------------------------------------------------------------------------------------------------


def test_loss_logit_and_head_gradients_are_those_of_autograd() -> None:
    model, rows = tiny_model(tie_word_embeddings=False), rows_of(20)
    found = measure(model, rows, projections=None)
    assert found.grad_norm is None
    head = [model.get_output_embeddings().weight]
    np.testing.assert_allclose(found.head_grad, backwards(model, rows, head), rtol=1e-4)
    ids = torch.tensor(rows[0].ids)
    logits = model(input_ids=ids[None]).logits[0][rows[0].at - 1]
    target = ids[rows[0].at]
    np.testing.assert_allclose(found.logit_grad, logit_gradients(logits, target).numpy(), rtol=1e-4)
    nll = functional.cross_entropy(logits, target, reduction="none").detach().numpy()
    np.testing.assert_allclose(found.loss, nll, rtol=1e-4)


def test_golden_values() -> None:
    found = measure(tiny_model(), rows_of(9), exact=True)
    assert found.grad_norm is not None
    np.testing.assert_allclose(found.loss[:3], GOLDEN["loss"], rtol=1e-3)
    np.testing.assert_allclose(found.logit_grad[:3], GOLDEN["logit_grad"], rtol=1e-3)
    np.testing.assert_allclose(found.head_grad[:3], GOLDEN["head_grad"], rtol=1e-3)
    np.testing.assert_allclose(found.grad_norm[:3], GOLDEN["grad_norm"], rtol=1e-3)


def test_tied_weights_count_once_and_both_their_parts_do() -> None:
    tied, rows = tiny_model(), rows_of(20)
    assert TokenGradients(tied).tied and TokenGradients(tied).size == sum(p.numel() for p in tied.parameters())
    found = measure(tied, rows, exact=True)
    embedding = backwards(tied, rows, [tied.get_input_embeddings().weight])
    assert not np.allclose(found.head_grad, embedding, rtol=1e-3)  # the shared matrix has a part through the inputs too


def test_adapters_alone() -> None:
    model, rows = adapted(), rows_of(30, 30)
    mine = [p for p in model.parameters() if p.requires_grad]
    plain = backwards(model, rows, mine)
    assert TokenGradients(model, "trainable").size == sum(p.numel() for p in mine)
    np.testing.assert_allclose(measure(model, rows, "trainable", exact=True).grad_norm, plain, rtol=1e-3)
    near = measure(model, rows, "trainable").grad_norm
    assert near is not None and np.sqrt(np.mean((near / plain - 1) ** 2)) < 0.12
    whole = measure(model, rows, exact=True).grad_norm
    assert whole is not None and np.all(whole > plain)
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_only_the_output_layer_is_closed() -> None:
    model, rows = tiny_model(tie_word_embeddings=False), rows_of(12)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name == "lm_head.weight")
    found = measure(model, rows, "trainable", projections=1)
    np.testing.assert_allclose(found.grad_norm, found.head_grad)


# --- what must not change a value ----------------------------------------------------------------------------------------


def test_padding_batches_and_stacks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), rows_of(31, 9, 17, 17)
    whole = measure(model, rows, projections=12)
    alone = measure(model, rows, projections=12, batch=1)
    monkeypatch.setattr("trimtab.analyze.token_gradients._LOGITS", 7 * VOCAB)
    monkeypatch.setattr("trimtab.analyze.token_gradients._SIDE", 5)
    small = measure(model, rows, projections=12, batch=40)
    for name in ("loss", "logit_grad", "head_grad", "grad_norm", "grad_se"):
        for other in (alone, small):
            np.testing.assert_allclose(getattr(other, name), getattr(whole, name), rtol=2e-3, err_msg=name)


def test_long_rows_go_through_several_blocks_as_through_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(50)
    model = tiny_model()
    want = measure(model, rows, projections=4)
    gradients = TokenGradients(model.eval())
    with torch.no_grad():
        gradients._settle_attention(next(gradients._batches(rows, 50)))
    assert gradients._attention == "trimtab_causal"
    monkeypatch.setattr("trimtab.analyze.causal._BLOCK", 16)
    np.testing.assert_allclose(measure(model, rows, projections=4).grad_norm, want.grad_norm, rtol=1e-3)
    monkeypatch.setattr("trimtab.analyze.token_gradients.FORWARD_MODE", "eager")
    np.testing.assert_allclose(measure(model, rows, projections=4).grad_norm, want.grad_norm, rtol=1e-3)


def test_the_model_is_left_as_it_was_and_bf16_is_measured_in_fp32() -> None:
    model, rows = tiny_model(attention_dropout=0.3).train(), rows_of(12)
    head, attention = model.get_output_embeddings(), model.config._attn_implementation
    found = measure(model, rows, projections=4)
    assert (
        model.training
        and model.get_output_embeddings() is head
        and model.lm_head.weight is model.model.embed_tokens.weight
    )
    assert model.config._attn_implementation == attention and all(p.grad is None for p in model.parameters())
    low = model.bfloat16()
    rounded = measure(low, rows, projections=4)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert rounded.grad_norm is not None and found.grad_norm is not None
    np.testing.assert_allclose(rounded.loss, found.loss, rtol=2e-2)
    np.testing.assert_allclose(measure(low.float(), rows, projections=4).grad_norm, rounded.grad_norm, rtol=1e-3)


def test_directions_are_functions_of_seed_and_number() -> None:
    like = {"a": torch.zeros(3, 2), "b": torch.zeros(5)}
    whole = random_directions(like, 7, 0, 6, None)
    part = random_directions(like, 7, 4, 2, None)
    assert all(torch.equal(part[name], whole[name][4:]) for name in like)
    assert not torch.equal(random_directions(like, 8, 4, 2, None)["a"], part["a"])


def test_guides_are_orthonormal_and_random_directions_stay_clear_of_them() -> None:
    like = {"a": torch.zeros(6, 5), "b": torch.zeros(9)}
    made = random_directions(like, 0, 0, 4, None)
    made = {name: torch.cat([v, v[:1] * 2 - v[1:2], torch.zeros_like(v[:1])]) for name, v in made.items()}
    guides = orthonormal(made)
    assert guides is not None and len(guides["a"]) == 4  # two of the six are sums of the others, or nothing
    flat = torch.cat([v.flatten(1) for v in guides.values()], 1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(4), atol=1e-5, rtol=0)
    free = random_directions(like, 0, 0, 3, guides)
    assert (torch.cat([v.flatten(1) for v in free.values()], 1) @ flat.T).abs().max() < 1e-4
    assert orthonormal({"a": torch.zeros(2, 3)}) is None


# --- what cannot be measured ---------------------------------------------------------------------------------------------


def test_named_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), rows_of(12)
    with pytest.raises(UserError, match="projections: 0"):
        measure(model, rows, projections=0)
    with pytest.raises(UserError, match="no token to measure"):
        measure(model, [TokenRow(rows[0].ids, np.array([], int), np.array([], int))])
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(UserError, match="requires a gradient"):
        TokenGradients(model, "trainable")
    with pytest.raises(UserError, match="no output layer"):
        TokenGradients(SimpleNamespace(get_output_embeddings=lambda: None))

    def refuse(*args: Any) -> Any:
        raise NotImplementedError("Trying to use forward AD with a kernel that does not support it")

    monkeypatch.setattr("trimtab.analyze.token_gradients.jvp", refuse)
    with pytest.raises(UserError, match=r"cannot be differentiated forwards .*use 'exact'"):
        measure(tiny_model(), rows)


def test_logits_that_are_not_the_output_layers_own_are_refused() -> None:
    model, rows = tiny_model(), rows_of(12)
    plain = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = 0.1 * torch.tanh(out.logits / 0.1)
        return out

    model.forward = capped  # type: ignore[method-assign]
    with pytest.raises(UserError, match="softcap"):
        measure(model, rows)


GOLDEN = {
    "loss": [4.1111, 4.3057, 4.2449],
    "logit_grad": [0.99151, 0.99443, 0.99359],
    "head_grad": [5.6045, 5.6201, 5.6141],
    "grad_norm": [8.241, 7.8689, 8.9947],
}
