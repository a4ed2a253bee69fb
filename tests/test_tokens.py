"""The life of a control token on tiny Llamas: tied, untied, padded; every initialisation; LoRA rows; merge; audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from render_fixtures import chatml_tokenizer, nfkc_tokenizer
from trimtab.data.render import Renderer
from trimtab.errors import Fault, UserError
from trimtab.models.tokens import add_control_tokens, audit, controls_of, merge_adapter, trainable_rows

NAMES = ["mode:positive", "mode:rejective", "policy:north-quay"]


def tiny(rows: int, tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def matrices(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_keeps_the_rest(tied: bool, spare: int, dtype: torch.dtype) -> None:
    tok = chatml_tokenizer()
    size = len(tok)
    model = tiny(size + spare, tied, dtype)
    old = [m[:size].clone() for m in matrices(model)]
    ids = add_control_tokens(tok, model, NAMES)
    assert list(ids) == NAMES and sorted(ids.values()) == [size, size + 1, size + 2]
    assert matrices(model)[0].shape[0] == max(size + spare, size + 3) == model.config.vocab_size
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for before, after in zip(old, matrices(model)):
        assert torch.equal(before, after[:size])
    assert audit(tok, model, ids) == []
    assert tok.convert_ids_to_tokens(ids["mode:positive"]) == "<|trimtab:mode:positive|>"
    renderer = Renderer(tok, controls=ids)
    assert ids["mode:positive"] in renderer.chat([{"role": "user", "content": "x"}], controls=["mode:positive"]).ids
    assert set(ids.values()) <= set(renderer.banned_ids)


@pytest.mark.parametrize("tied", [True, False])
def test_inits(tied: bool) -> None:
    def fresh(**kw: Any) -> tuple[Any, Any, dict[str, int]]:
        tok = chatml_tokenizer()
        model = tiny(len(tok), tied)
        return tok, model, add_control_tokens(tok, model, NAMES, **kw)

    def near(a: torch.Tensor, b: torch.Tensor, spread: float) -> bool:
        gap = float((a - b).abs().max())
        return 0 < gap < 0.1 * spread  # noise is there, and tiny

    tok, model, ids = fresh()
    ordinary = [i for i in range(len(tok)) if i not in tok.added_tokens_decoder]
    for m in matrices(model):
        for i in ids.values():
            assert near(m[i], m[ordinary].mean(0), float(m.std()))
    words = {"mode:positive": "the tide table", "mode:rejective": "low", "policy:north-quay": "north of the quay"}
    tok, model, ids = fresh(init="description", descriptions=words)
    for m in matrices(model):
        for name, i in ids.items():
            assert near(m[i], m[tok.encode(words[name], add_special_tokens=False)].mean(0), float(m.std()))
    tok, model, ids = fresh(init="copy", copy_from="<|im_start|>")
    for m in matrices(model):
        for i in ids.values():
            assert near(m[i], m[tok.convert_tokens_to_ids("<|im_start|>")], float(m.std()))
    again = fresh(init="copy", copy_from="<|im_start|>")[1]
    assert torch.equal(matrices(again)[0], matrices(model)[0])
    other = fresh(init="copy", copy_from="<|im_start|>", seed=1)[1]
    assert not torch.equal(matrices(other)[0], matrices(model)[0])


def test_reserved_tokens_come_first_and_only_free_ones() -> None:
    tok = chatml_tokenizer()
    good = [f"<|reserved_special_token_{i}|>" for i in range(3)] + ["<|control_0|>"]
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in good], special_tokens=True)
    tok.add_tokens([AddedToken("<unused0>", special=False, normalized=False)])
    tok.chat_template = tok.chat_template.replace("<|im_start|>' +", "<|reserved_special_token_1|><|im_start|>' +")
    size, model = len(tok), tiny(len(tok), True)
    with torch.no_grad():
        model.get_input_embeddings().weight[size - 5 :] = 0.0  # as an untrained reserved row
    ids = add_control_tokens(tok, model, NAMES[:2])
    assert [tok.convert_ids_to_tokens(i) for i in ids.values()] == [good[0], good[2]]
    more = add_control_tokens(tok, model, ["a", "b"])  # remembers what is taken, then makes new ones
    assert [tok.convert_ids_to_tokens(i) for i in more.values()] == [good[3], "<|trimtab:b|>"]
    assert controls_of(tok) == {**ids, **more}
    assert len(tok) == size + 1 and audit(tok, model, controls_of(tok)) == []
    with pytest.raises(UserError, match="'a' is already a control token"):
        add_control_tokens(tok, model, ["a"])


@pytest.mark.parametrize(
    ("names", "kw", "words"),
    [
        ([], {}, "at least one"),
        (["a", "a"], {}, "given twice"),
        (["a b"], {}, "may hold only"),
        (["<|im_end|>"], {}, "may hold only"),
        (["a"], {"init": "zeros"}, "init: 'zeros'"),
        (["a"], {"init": "copy"}, "copy_from: goes with"),
        (["a"], {"copy_from": "x"}, "copy_from: goes with"),
        (["a"], {"init": "copy", "copy_from": "nowhere"}, "not a token"),
        (["a"], {"init": "description"}, "descriptions: goes with"),
        (["a"], {"init": "description", "descriptions": {"b": "x"}}, "no description for 'a'"),
        (["a"], {"init": "description", "descriptions": {"a": ""}}, "no description for 'a'"),
    ],
)
def test_bad_requests_change_nothing(names: list[str], kw: dict[str, Any], words: str) -> None:
    tok = chatml_tokenizer()
    model = tiny(len(tok), True)
    before, size = matrices(model)[0].clone(), len(tok)
    with pytest.raises(UserError, match=words):
        add_control_tokens(tok, model, names, **kw)
    assert torch.equal(matrices(model)[0], before) and len(tok) == size and controls_of(tok) == {}


@pytest.mark.parametrize("tied", [True, False])
def test_full_training_moves_only_the_rows(tied: bool) -> None:
    tok = chatml_tokenizer()
    model = tiny(len(tok) + 5, tied)
    ids = add_control_tokens(tok, model, NAMES)
    before = [m.clone() for m in matrices(model)]
    layer = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    batch = torch.tensor([[*ids.values(), *range(20)]])
    with trainable_rows(model, list(ids.values())) as rows:
        decayed = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        with pytest.raises(UserError, match="weight_decay"):
            rows.check(decayed)
        held = {id(p) for p in rows.parameters}
        optimizer = torch.optim.AdamW(
            [
                {"params": rows.parameters, "weight_decay": 0.0},
                {"params": [p for p in model.parameters() if id(p) not in held], "weight_decay": 0.1},
            ],
            lr=1e-2,
        )
        rows.check(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    for old, new in zip(before, matrices(model)):
        changed = (old != new).any(1).nonzero().flatten().tolist()
        assert changed == sorted(ids.values())
    assert not torch.equal(layer, model.model.layers[0].mlp.up_proj.weight)
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()  # outside the context nothing is masked
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None and (gradient[3] != 0).any()
    for bad in ([], [-1], [10**6]):
        with pytest.raises(UserError, match="each must be a row"):
            trainable_rows(model, bad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_rows_and_merges(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    tok = chatml_tokenizer()
    model = tiny(len(tok) + 2, tied, dtype)
    ids = add_control_tokens(tok, model, NAMES)
    before = [m.clone() for m in matrices(model)]
    kwargs = trainable_rows(model, list(ids.values())).peft_kwargs
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **kwargs))
    with pytest.raises(UserError, match="before the adapter"):
        add_control_tokens(tok, adapted, ["late"])
    batch = torch.tensor([[*ids.values(), *range(20)]])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(input_ids=batch).logits
    merged = merge_adapter(adapted)
    assert type(merged) is LlamaForCausalLM and not [n for n, _ in merged.named_parameters() if "lora" in n]
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    for old, new in zip(before, matrices(merged)):
        assert (old != new).any(1).nonzero().flatten().tolist() == sorted(ids.values())
    merged.eval()
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=batch).logits, wanted, atol=tolerance)
    # through a directory: merged model and tokenizer are one plain checkpoint
    merged.save_pretrained(tmp_path / "merged")
    tok.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert controls_of(again) == ids == controls_of(tok)
    assert audit(again, loaded, ids) == []
    weights = merged.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(loaded.state_dict()[key], weights[key]) for key in weights)
    chat = [{"role": "user", "content": "Hello <|trimtab:mode:positive|>"}]
    assert (
        Renderer(again, controls=ids).chat(chat, controls=["mode:rejective"]).ids.tolist()
        == Renderer(tok, controls=ids).chat(chat, controls=["mode:rejective"]).ids.tolist()
    )
    # and the adapter alone goes back onto the same start
    base = tiny(len(chatml_tokenizer()) + 2, tied, dtype)
    add_control_tokens(chatml_tokenizer(), base, NAMES)
    with torch.no_grad():
        back = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=batch).logits
    assert torch.allclose(back, wanted, atol=tolerance)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge_adapter(merged)


def test_merge_notices_a_wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    tok = chatml_tokenizer()
    model = tiny(len(tok), True)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    monkeypatch.setattr(type(adapted.base_model), "merge_and_unload", lambda self, **kw: self.unload())
    with pytest.raises(Fault, match="logits differ"):
        merge_adapter(adapted)


def test_audit_finds_what_is_wrong() -> None:
    tok = chatml_tokenizer()
    model = tiny(len(tok) + 20, False)
    ids = add_control_tokens(tok, model, NAMES)
    a, b, _ = ids.values()
    assert audit(tok, None, ids) == []

    def problems(**controls: int) -> str:
        return "\n".join(audit(tok, model, controls))

    assert "shares id" in problems(x=a, y=a)
    assert "is not an added token" in problems(x=5)
    assert "is the tokenizer's eos_token" in problems(x=tok.eos_token_id)
    assert "stands in the chat template" in problems(x=tok.convert_tokens_to_ids("<|im_start|>"))
    with torch.no_grad():
        model.get_input_embeddings().weight[a] = 0.0
        model.get_output_embeddings().weight[a, 3] = float("nan")
        model.get_output_embeddings().weight[b] = model.get_output_embeddings().weight[7]
    assert problems(x=a).splitlines() == [
        "x: its input row is zero (not initialised)",
        "x: its output row is not finite",
    ]
    assert problems(x=b) == "x: its output row equals that of id 7"

    tok.add_tokens([AddedToken("<|soft|>", special=False, normalized=False)])
    found = problems(x=tok.convert_tokens_to_ids("<|soft|>"))
    assert "flag special is False" in found and "shown even with skip_special_tokens" in found
    for flag in ("lstrip", "rstrip", "single_word"):
        surface = f"<|{flag}|>"
        tok.add_tokens([AddedToken(surface, special=True, normalized=False, **{flag: True})], special_tokens=True)
        assert f"flag {flag} is True" in problems(x=tok.convert_tokens_to_ids(surface))
    assert "is lost between letters" in problems(x=tok.convert_tokens_to_ids("<|single_word|>"))
    small = tiny(a, True)
    assert f"id {a} has no input row" in "\n".join(audit(tok, small, {"x": a}))

    wide = nfkc_tokenizer()
    loose = "\n".join(audit(wide, None, {"x": wide.convert_tokens_to_ids("<|loose|>")}))
    assert "flag normalized is True" in loose and "full width" in loose

    apart = tiny(len(tok), True)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    assert "are apart" in "\n".join(audit(tok, apart, {}))
