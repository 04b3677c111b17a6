"""lm-evaluation-harness on our models: tasks with local data, against each request computed by itself."""

import json
import math
import sys

import pytest
import torch

from megaslm.data import load_tokenizer, train_bpe
from megaslm.errors import UserError
from megaslm.evaluation import HarnessTasks, run_harness, task_rows
from megaslm.generation import GenerationOptions, Generator
from megaslm.model import build_model

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "the cat sees", "choices": [" a dog", " one bird", " nothing at all"], "answer": 0},
    {"question": "one bird runs. a dog", "choices": [" runs.", " sees", " the"], "answer": 1},
    {"question": "", "choices": ["the", "a dog runs", "one"], "answer": 2},
    {"question": "a dog runs. " * 12, "choices": ["the cat", "a dog", "one bird sees the cat"], "answer": 1},
    {"question": "birds and ", "choices": ["cats", "dogs"], "answer": 1},
]
TEXTS = ["the cat sees a dog", "one bird runs. " * 12, "dogs"]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter([*TEXTS, *(one["question"] for one in QUESTIONS)] * 3), 270).save(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer, tiny_config):
    config = tiny_config(tokenizer, CONTEXT, init_std=0.3)
    return build_model(config, seed=5).eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks of our own: choice, rolling, and one whose data lies on the hub."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, form, rows in (
        ("choice", CHOICE, QUESTIONS),
        ("rolling", ROLLING, [{"text": text} for text in TEXTS]),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(COMMON.format(name=f"our_{name}", data=data) + form)
    (folder / "hub.yaml").write_text("task: our_hub\ndataset_path: nobody/nothing\ntest_split: test\n" + CHOICE)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def harness_model(model, tokenizer):
    from megaslm.evaluation.harness_model import HarnessModel

    return HarnessModel(model, tokenizer, batch_size=3, quiet=True)


def requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index, metadata=("our_task", index, 1)) for index, one in enumerate(arguments)]


@torch.no_grad()
def log_likelihood(model, context: list[int], tokens: list[int]) -> float:
    """One request by itself: the last tokens of what fits."""
    window = [*context, *tokens][-CONTEXT - 1 :]
    log_probs = model(torch.tensor([window[:-1]]))[0].double().log_softmax(-1)
    return sum(log_probs[at - 1, window[at]].item() for at in range(len(window) - len(tokens), len(window)))


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As the harness defines it: spaces between the two belong to the continuation, a text begins behind eod."""
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation).tolist()
    ids = tokenizer.encode(kept).tolist()
    return ids or [tokenizer.eod_id], whole[len(ids) :]


def test_accuracy_of_a_task_of_our_own(model, tokenizer, tasks):
    found = run_harness(model, tokenizer, ["our_choice"], include_path=tasks, batch_size=4)
    right = []
    for one in QUESTIONS:
        scores = [log_likelihood(model, *encode_pair(tokenizer, one["question"], choice)) for choice in one["choices"]]
        right.append(max(range(len(scores)), key=scores.__getitem__) == one["answer"])
    assert 0 < sum(right) < len(right)
    assert found["results"]["our_choice"]["acc,none"] == sum(right) / len(right)
    limited = run_harness(model, tokenizer, ["our_choice"], include_path=tasks, limit=2, num_fewshot=0)
    assert limited["results"]["our_choice"]["acc,none"] == sum(right[:2]) / 2


def test_every_likelihood_is_that_of_the_request_alone(model, tokenizer, harness_model):
    pairs = [(one["question"], choice) for one in QUESTIONS for choice in one["choices"]]
    found = harness_model.loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        expected = log_likelihood(model, *encode_pair(tokenizer, context, continuation))
        assert value == pytest.approx(expected, abs=1e-4), (context, continuation)


def test_a_continuation_that_its_context_swallows_is_encoded_by_itself(model, tokenizer, harness_model):
    text = max((tokenizer.decode([token]) for token in range(tokenizer.vocab_size)), key=len)
    context, continuation = text[:-1], text[-1]
    assert len(tokenizer.encode(text)) == 1 == len(tokenizer.encode(continuation))
    ids = tokenizer.encode(context).tolist(), tokenizer.encode(continuation).tolist()
    ((value, _),) = harness_model.loglikelihood(requests("loglikelihood", (context, continuation)))
    assert value == pytest.approx(log_likelihood(model, *ids), abs=1e-4)


def test_perplexity_of_whole_texts(model, tokenizer, tasks):
    found = run_harness(model, tokenizer, ["our_rolling"], include_path=tasks)
    total = 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        for start in range(0, len(ids), CONTEXT):  # each window as far back as the context reaches
            end = min(start + CONTEXT, len(ids))
            total += log_likelihood(model, [tokenizer.eod_id, *ids[:start]], ids[start:end])
    expected = math.exp(-total / sum(len(text.encode()) for text in TEXTS))
    assert found["results"]["our_rolling"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-5)


def test_generations_end_before_their_stop_strings(model, tokenizer, harness_model):
    contexts = ["the cat", "a dog runs. one bird sees", "the cat sees a dog runs. " * 4]
    asked = {"until": ["e"], "max_gen_toks": 10, "temperature": 0.7, "top_p": 0.9, "do_sample": False}
    found = harness_model.generate_until(requests("generate_until", *((context, asked) for context in contexts)))
    generator = Generator(model, tokenizer)
    for context, text in zip(contexts, found, strict=True):
        prompt = tokenizer.encode(context).tolist()[-(CONTEXT - 10) :]
        (alone,) = generator.generate([prompt], GenerationOptions(max_new_tokens=10, stop=("e",)))
        assert text == alone.text.split("e")[0]
    # As the harness's adapter: all that is asked for is generated, of as much of the prompt as then fits.
    (whole,) = harness_model.generate_until(requests("generate_until", (contexts[2], {"max_gen_toks": 20})))
    prompt = tokenizer.encode(contexts[2]).tolist()[-(CONTEXT - 20) :]
    assert whole == generator.generate([prompt], GenerationOptions(max_new_tokens=20))[0].text
    with pytest.raises(UserError, match="task our_task asks for num_beams"):
        harness_model.generate_until(requests("generate_until", ("a", {"num_beams": 4})))
    with pytest.raises(UserError, match="our_task asks for 24 new tokens, and .* has room for 23"):
        harness_model.generate_until(requests("generate_until", ("a", {"max_gen_toks": CONTEXT})))


def test_draws_are_the_generators_and_temperature_0_is_greedy(model, tokenizer, harness_model):
    def generate(**asked) -> str:
        (text,) = harness_model.generate_until(requests("generate_until", ("the cat", {"max_gen_toks": 12, **asked})))
        return text

    def alone(**options) -> str:
        return (
            Generator(model, tokenizer).generate(["the cat"], GenerationOptions(max_new_tokens=12, **options))[0].text
        )

    greedy = alone()
    assert generate(do_sample=True, temperature=0.0, top_p=0.9) == generate(do_sample=False) == generate() == greedy
    assert generate(do_sample=True, temperature=2.0) == alone(temperature=2.0) != greedy
    assert generate(temperature=2.0, top_k=7, seed=3) == alone(temperature=2.0, top_k=7, seed=3) != greedy


def test_a_generation_ends_at_the_models_own_ids(model, tokenizer, harness_model):
    from megaslm.evaluation.harness_model import HarnessModel

    (alone,) = Generator(model, tokenizer).generate(["the cat"], GenerationOptions(max_new_tokens=8))
    end = next(index for index, token in enumerate(alone.tokens) if index and token not in alone.tokens[:index])
    adapter = HarnessModel(model, tokenizer, 2, quiet=True, eod_ids=[alone.tokens[end]])
    (text,) = adapter.generate_until(requests("generate_until", ("the cat", {"max_gen_toks": 8})))
    assert text == tokenizer.decode(list(alone.tokens[:end]))


def test_cuts_are_told_by_task(harness_model, caplog):
    long = "the cat sees a dog runs. " * 4
    harness_model.loglikelihood(requests("loglikelihood", (long, " the"), ("the", " cat")))
    assert "our_task: 1 requests are cut to their last 25 tokens" in caplog.text
    harness_model.generate_until(requests("generate_until", (long, {"max_gen_toks": 4})))
    assert "our_task: 1 requests are cut to their last 20 tokens" in caplog.text


def test_a_tokenizer_without_an_end_of_document(model, tokenizer):
    from megaslm.evaluation.harness_model import HarnessModel

    without = load_tokenizer(tokenizer.name)
    without.eod_id = without.bos_id = None
    adapter = HarnessModel(model, without, 2, quiet=True)
    assert len(adapter.loglikelihood(requests("loglikelihood", ("the", " cat")))) == 1
    with pytest.raises(UserError, match="no end-of-document token"):
        adapter.loglikelihood_rolling(requests("loglikelihood_rolling", ("the cat",)))
    without.eod_id, without.bos_id = 1, 2  # as by the harness's own adapter
    assert (adapter.eot_token_id, adapter.prefix_token_id) == (1, 2)


def test_results_are_rows_and_nothing_else_is_said(model, tokenizer, tasks, capfd):
    found = run_harness(model, tokenizer, ["our_choice", "our_rolling"], include_path=tasks)
    rows = {row[0]: row[1:] for row in task_rows(found)}
    assert rows["our_choice"][:3] == ["acc", "none", "0"]
    assert float(rows["our_choice"][3]) == pytest.approx(found["results"]["our_choice"]["acc,none"], abs=1e-4)
    assert float(rows["our_choice"][4]) > 0  # its standard error
    assert rows["our_rolling"][0] == "byte_perplexity" and rows["our_rolling"][4] == "-"
    captured = capfd.readouterr()
    assert "it/s" not in captured.err and "fatal" not in captured.err and captured.out == ""


def test_mistakes_of_tasks(model, tokenizer, tasks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)  # where the harness looks for metrics that it does not know
    with pytest.raises(UserError, match="our_choice cannot be run .*change its YAML file"):
        run_harness(model, tokenizer, ["our_choice"], include_path=tasks, num_fewshot=50)
    for names, says in ((["a", ""], "name of a task is empty"), (["a", "a"], "a task is given twice: a")):
        with pytest.raises(UserError, match=says):
            HarnessTasks(names)
    text = (tasks / "choice.yaml").read_text()
    for name, before, after, says in (
        ("metric", "metric: acc,", "metric: weather,", "does not know the metric weather of the task our_metric"),
        ("missing", ".jsonl", ".none", r"our_missing cannot be loaded \((?!.*network)"),
        ("template", "doc_to_choice: choices", "doc_to_choice: '{{nothing.at.all}}'", r"our_template cannot be"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "task.yaml").write_text(text.replace("our_choice", f"our_{name}").replace(before, after))
        with pytest.raises(UserError, match=says):
            run_harness(model, tokenizer, [f"our_{name}"], include_path=folder)


def test_a_fault_of_ours_keeps_its_traceback(model, tokenizer, tasks, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("broken")

    monkeypatch.setattr("megaslm.evaluation.harness_model.score_continuations", broken)
    with pytest.raises(AssertionError, match="broken"):
        run_harness(model, tokenizer, ["our_choice"], include_path=tasks)


def test_an_older_harness(model, tokenizer, tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.delattr(TaskManager, "load")
    with pytest.raises(UserError, match="need lm-evaluation-harness, lm_eval>=0.4.12"):
        run_harness(model, tokenizer, ["our_choice"], include_path=tasks)
    monkeypatch.delattr("lm_eval.models.utils.normalize_gen_kwargs")
    monkeypatch.delitem(sys.modules, "megaslm.evaluation.harness_model")
    with pytest.raises(UserError, match=r"lm_eval>=0.4.12 \(cannot import name 'normalize_gen_kwargs'"):
        run_harness(model, tokenizer, ["our_choice"], include_path=tasks)


def test_what_cannot_be_had(model, tokenizer, tasks, monkeypatch):
    import datasets
    from lm_eval.tasks import TaskManager

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"our_hub cannot be loaded \(Couldn't reach the Hub\).*needs a network"):
        run_harness(model, tokenizer, ["our_hub"], include_path=tasks)
    with pytest.raises(UserError, match="no folder .*/none with"):
        run_harness(model, tokenizer, ["our_hub"], include_path=tasks / "none")
    listed = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **options: listed(self, include_path=tasks, include_defaults=False)
    )
    with pytest.raises(UserError, match="no task nothing, neither in .* nor in the harness"):
        run_harness(model, tokenizer, ["nothing", "our_hub"], include_path=tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="need lm-evaluation-harness, lm_eval>=0.4.12 .*pip install"):
        run_harness(model, tokenizer, ["our_choice"], include_path=tasks)
