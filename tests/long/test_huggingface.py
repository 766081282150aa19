# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that compute their loss, on ragged labels: N ranks against one process on the whole batch.

The models are tiny and have random weights. Transformers computes losses in float32; here it does so in float64, so
that results can be compared. Without transformers these tests are skipped, except in CI.
"""

import copy
import importlib.util
import os

import pytest
import torch
from one_process import assert_same
from ranks import on_ranks

from distributed_trainer import create_distributed_trainer

if importlib.util.find_spec("transformers") is None and "CI" not in os.environ:
    pytest.skip("transformers is not installed: `make test-all` installs it", allow_module_level=True)

F64 = torch.float64
NUM_SAMPLES, LENGTH, VOCABULARY, NUM_LABELS = 7, 10, 30, 3
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 16, "max_position_embeddings": 16, "num_labels": NUM_LABELS}
LLAMA = {**BERT, "num_key_value_heads": 2}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 8, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
BART = {"vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
BART |= {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("ffn_dim", 16), ("attention_heads", 2))
}
VIT = {**SIZES, "intermediate_size": 16, "image_size": 8, "patch_size": 4, "num_labels": NUM_LABELS}
MIXTRAL = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}

# Name: class of the model, of its configuration, arguments of the configuration, kind of the batch.
MODELS = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2},
        "tokens",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, "tokens"),
    "bert-masked": ("BertForMaskedLM", "BertConfig", BERT, "tokens"),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", BERT, "token-labels"),
    "bert-classes": ("BertForSequenceClassification", "BertConfig", BERT, "classes"),
    "bert-several": ("BertForSequenceClassification", "BertConfig", BERT, "several"),
    "bert-numbers": ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 1}, "numbers"),
    "distilbert-answers": ("DistilBertForQuestionAnswering", "DistilBertConfig", DISTILBERT, "answers"),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "tokens"),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, "tokens"),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, "images"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MIXTRAL, "tokens"),
}


def make_model(name, **extra):
    """Return a model in float64, without dropout, the same on every rank."""
    import transformers

    kind, config, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**arguments, **extra)).to(F64)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval() if name in ("gpt2", "bart") else model  # dropout of attention has no module


def make_batch(kind, step):
    """Return inputs with labels; each sample has another number of labels that are not -100."""
    torch.manual_seed(10 + step)
    tokens = torch.randint(3, VOCABULARY, (NUM_SAMPLES, LENGTH))
    lengths = torch.randint(1, LENGTH + 1, (NUM_SAMPLES, 1)).sort(0).values
    is_padding = torch.arange(LENGTH) >= lengths
    batch = {"input_ids": tokens, "attention_mask": (~is_padding).long()}
    if kind == "images":
        return {"pixel_values": torch.randn(NUM_SAMPLES, 3, 8, 8, dtype=F64), "labels": tokens[:, 0] % NUM_LABELS}
    if kind == "tokens":
        return batch | {"labels": tokens.masked_fill(is_padding, -100)}
    if kind == "token-labels":
        return batch | {"labels": (tokens % NUM_LABELS).masked_fill(is_padding, -100)}
    if kind == "classes":
        return batch | {"labels": (tokens[:, 0] % NUM_LABELS).masked_fill(lengths[:, 0] < 4, -100)}
    if kind == "several":
        return batch | {"labels": torch.rand(NUM_SAMPLES, NUM_LABELS, dtype=F64).round()}
    if kind == "numbers":
        return batch | {"labels": torch.randn(NUM_SAMPLES, dtype=F64)}
    # Positions beyond the sequence are ignored, others for the start than for the end.
    positions = {"start_positions": tokens[:, 0] % (LENGTH + 4), "end_positions": tokens[:, 1] % (LENGTH + 4)}
    return batch | positions


def loss_of_model(outputs, _):
    return outputs.loss


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def train(model, batches, trainer=None, criterion=loss_of_model, **options):
    """Train for some steps, by plain torch without a trainer; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        if trainer is None:
            optimizer.zero_grad()
            loss = criterion(model(**batch), None)
            loss.backward()
            optimizer.step()
        else:
            loss = trainer.train_step(batch, next(iter(batch.values())), criterion, optimizer, **options)
        losses.append(loss.item())
    return losses


def compare(name, batches, trainer_model=None, **options):
    """Train with and without a trainer; assert that losses and weights are the same."""
    reference = make_model(name)
    model = copy.deepcopy(reference) if trainer_model is None else trainer_model
    expected = train(reference, batches)
    trainer = create_distributed_trainer(model)
    assert train(model, batches, trainer, **options) == pytest.approx(expected, rel=1e-9)
    assert_same(model, reference, 1e-9, 1e-8)  # some gradients are rounding errors; T5 computes norms in float32
    trainer.close()


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "as a mean over samples" in record.getMessage()]


@pytest.mark.parametrize("name", MODELS)
@on_ranks(1, 2, 3)
def test_models(world, name, in_float64, caplog):
    """The mean is that of one process, although the ranks have other numbers of labels; without a warning."""
    compare(name, [make_batch(MODELS[name][-1], step) for step in range(3)])
    assert not warnings(caplog)


@pytest.mark.parametrize("name", ["gpt2", "bert-tokens", "t5"])
@on_ranks(1, 2, 3)
def test_microbatches(world, name, in_float64):
    compare(name, [make_batch(MODELS[name][-1], step) for step in range(3)], microbatches=3)


@pytest.mark.parametrize("number", [40, torch.tensor(40)], ids=["int", "tensor"])
@on_ranks(1, 2, 3)
def test_number_of_items(world, number, in_float64):
    """The loss is the sum divided by the number that the batch has, as in one process."""
    compare("llama", [make_batch("tokens", step) | {"num_items_in_batch": number} for step in range(3)])


@on_ranks(2, 3)
def test_router(world, in_float64, caplog):
    """A router's balancing loss is no mean: it counts as one over samples, with a warning that says so."""
    model = make_model("mixtral", output_router_logits=True)
    trainer = create_distributed_trainer(model)
    train(model, [make_batch("tokens", 0)], trainer)
    assert len(warnings(caplog)) == (world.rank == 0)
    assert all("outputs.loss" in text and "MeanLoss(" in text for text in warnings(caplog))
    trainer.close()


@on_ranks(2, 3)
def test_weight(world, in_float64):
    """A weight that counts labels before they are shifted is refused, the right one is accepted."""
    batches = [make_batch("tokens", step) for step in range(2)]
    model = make_model("gpt2")
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"weight= gives .* is a mean over"):
        labels = batches[0]["labels"]
        trainer.train_step(batches[0], labels, loss_of_model, optimizer, weight=lambda y: (y != -100).sum())
    trainer.train_step(batches[0], labels, loss_of_model, optimizer, weight=lambda y: (y[:, 1:] != -100).sum())
    trainer.close()


@pytest.mark.parametrize("name", ["llama", "distilbert-answers"])
@on_ranks(1, 2, 3)
def test_evaluate(world, name, in_float64):
    batches = [make_batch(MODELS[name][-1], step) for step in range(2)]
    model = make_model(name).eval()
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    with torch.no_grad():
        expected = model(**whole).loss.item()
    trainer = create_distributed_trainer(model)
    pairs = [(batch, batch["input_ids"]) for batch in batches]
    assert trainer.evaluate(pairs, loss_of_model)["loss"] == pytest.approx(expected, rel=1e-9)
    trainer.close()
