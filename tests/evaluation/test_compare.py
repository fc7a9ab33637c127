"""`compare`: both arms answer the same items, and the answers are those of lm-evaluation-harness on its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from loopexport import EvaluationError, LoopSpec, convert, plan_compare
from support.evaluation import tokenized_base, write_items

pytest.importorskip("lm_eval")
CPU = {"device": "cpu", "dtype": "float32", "batch_size": 4}
MILD = LoopSpec(span=(2, 4), steps=2)
DEEP = LoopSpec(span=(1, 5), steps=6, damping=1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tokenized_base("llama", tmp_path_factory.mktemp("compare") / "base")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("items") / "mine.jsonl", 30)


@pytest.mark.parametrize("kv", ["shared", "per_step"])
def test_loop_that_is_given_as_a_spec_stays_as_it_is(base, items, kv):
    for loop in (
        LoopSpec(span=None, steps=2, path=((0, 4), (2, 4), (1, 6)), kv=kv),
        LoopSpec(span=((0, 2), (3, 5)), steps=(3, 2), kv=kv),
    ):
        assert plan_compare(base, loop, items=items, **CPU).subject.spec == loop


def harness_answers(directory, items, **config):
    """The items as lm-evaluation-harness logs them for a directory, without a `Panel`."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from loopexport.evaluation.tasks import TaskSource

    lm = HFLM(pretrained=str(directory), trust_remote_code=True, **CPU)
    for name, value in config.items():
        setattr(lm.model.config, name, value)
    tasks = TaskSource(items=items).load()
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    return evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0)["samples"][items.stem]


@pytest.mark.parametrize(
    "loop",
    [
        {"span": DEEP.span, "steps": DEEP.steps, "damping": DEEP.damping},
        {"span": ["1:2x3", "3:5x2"], "damping": 1.0},
        {"path": "0-3,2-3,1-2,5"},
    ],
    ids=str,
)
def test_scores_are_those_of_two_separate_runs(base, items, tmp_path, loop):
    export = convert(base, tmp_path / "export", **loop)
    result = plan_compare(export.root, items=items, **CPU).run()
    for arm, directory in (("base", base), ("loop", export.root)):
        samples = {sample["doc_id"]: sample for sample in harness_answers(directory, items)}
        assert len(samples) == len(result.pairs) == 30
        for pair in result.pairs:
            answer, sample = getattr(pair, arm), samples[pair.item]
            assert answer.score == sample["acc"]
            assert pair.prompt_hash == sample["prompt_hash"]
            theirs = [loglikelihood for loglikelihood, _ in sample["filtered_resps"]]
            assert answer.loglikelihoods == pytest.approx(theirs, abs=2e-5)  # other batches
    assert any(pair.base.loglikelihoods != pair.loop.loglikelihoods for pair in result.pairs)


def test_base_and_export_give_one_result(base, items, tmp_path):
    export = convert(base, tmp_path / "export", span=MILD.span, steps=MILD.steps)
    of_base = plan_compare(base, MILD, items=items, **CPU).run()
    of_export = plan_compare(export.root, items=items, **CPU).run()
    assert of_base.pairs == of_export.pairs


@pytest.mark.parametrize("same", [LoopSpec(span=(2, 4), steps=1), LoopSpec(span=(2, 4), steps=3, anchor=1.0)])
def test_the_base_against_itself_is_exactly_zero(base, items, same, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    calls = []
    forward = HFLM._model_call
    monkeypatch.setattr(
        HFLM, "_model_call", lambda self, *args, **more: (calls.append(1), forward(self, *args, **more))[1]
    )
    plan = plan_compare(base, same, items=items, **CPU)
    result = plan.run()
    [row] = result.comparisons
    assert (row.difference, row.gained, row.lost, row.verdict) == (0, 0, 0, "inconclusive")
    assert all(pair.base == pair.loop for pair in result.pairs)
    assert any("this loop is its base" in warning for warning in plan.warnings)
    whole = len(calls)
    plan_compare(base, MILD, items=items, **CPU).run()
    assert whole == len(calls) - whole  # both were computed


def test_measures_the_floor_with_another_batch_size(base, items):
    floor = plan_compare(base, MILD, items=items, **CPU).run().floor
    assert floor.batch_sizes == (4, 2)
    assert floor.items == 8
    assert floor.largest_difference < 1e-4


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_where_it_stopped(base, items, tmp_path, monkeypatch):
    from loopexport.evaluation import panel

    monkeypatch.setattr(panel, "SLAB_BATCHES", 2)
    settings = {"items": items, "out": tmp_path / "out", **CPU}

    def kill(done, total):
        if done > total / 2:
            raise KilledError

    with pytest.raises(KilledError):
        plan_compare(base, MILD, **settings).run(kill)
    journal = tmp_path / "out" / "answers-0.jsonl"
    before = journal.read_bytes()
    journal.write_bytes(before + b'{"key": "cut off')
    assert before.count(b"\n") > 0
    result = plan_compare(base, MILD, **settings).run()
    assert journal.read_bytes().startswith(before)
    whole = plan_compare(base, MILD, items=items, **CPU).run()
    assert result.pairs == whole.pairs


def test_the_same_command_again_computes_nothing(base, items, tmp_path, monkeypatch):
    from loopexport.evaluation.arms import Model

    first = plan_compare(base, MILD, items=items, out=tmp_path / "out", **CPU).run()
    monkeypatch.setattr(Model, "use", lambda *args: pytest.fail("the model was loaded"))
    again = plan_compare(base, MILD, items=items, out=tmp_path / "out", **CPU).run()
    assert again == first


@pytest.mark.parametrize(
    ("loop", "change", "named"),
    [
        (DEEP, {}, "loop_steps|spec"),
        (MILD, {"limit": 5}, "limit: null, now 5"),
        (MILD, {"num_fewshot": 2}, "num_fewshot: null, now 2"),
        (MILD, {"seeds": (1,)}, r"seeds: \[1234\], now \[1\]"),
        (MILD, {"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_refuses_results_of_other_settings(base, items, tmp_path, loop, change, named):
    from loopexport.evaluation.settings import results_directory

    with results_directory(tmp_path / "out", plan_compare(base, MILD, items=items, **CPU).settings):
        pass
    with pytest.raises(EvaluationError, match=f"results of other settings.*({named}).*--out"):
        plan_compare(base, loop, items=items, out=tmp_path / "out", **{**CPU, **change})


def test_refuses_a_directory_of_other_files(base, items, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EvaluationError, match="other files"):
        plan_compare(base, MILD, items=items, out=tmp_path, **CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_edited_file_of_items_is_another_setting(base, tmp_path):
    path = write_items(tmp_path / "mine.jsonl", 4)
    plan_compare(base, MILD, items=path, out=tmp_path / "out", **CPU).run()
    write_items(path, 4, start=1)
    with pytest.raises(EvaluationError, match="files_sha256"):
        plan_compare(base, MILD, items=path, out=tmp_path / "out", **CPU)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_an_edited_file_of_the_model_is_another_setting(base, items, tmp_path, name):
    model = shutil.copytree(base, tmp_path / "base")
    plan = plan_compare(model, MILD, items=items, **CPU)
    file = model / name
    file.write_text(json.dumps({**json.loads(file.read_text()), "edited": True}) if file.exists() else "{}")
    edited = plan_compare(model, MILD, items=items, **CPU)
    assert {key for key in plan.settings if plan.settings[key] != edited.settings[key]} == {"model_files"}


def test_batches_are_halved_when_memory_runs_out(base, items, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from loopexport.evaluation import arms

    whole = plan_compare(base, MILD, items=items, **CPU).run()
    sizes = []
    forward = HFLM._model_call

    def limited(self, inputs, **kwargs):
        sizes.append((self.model.config.loop_steps, len(inputs)))
        if len(inputs) > 2 and self.model.config.loop_steps > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, inputs, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", limited)
    result = plan_compare(base, MILD, items=items, **CPU).run()
    assert max(size for steps, size in sizes) == 4
    for steps in (1, 2):  # the base was asked again: both arms have the same batches
        answered = [size for each, size in sizes if each == steps][-10:]
        assert max(answered) <= 2
    assert [pair.loop.score for pair in result.pairs] == [pair.loop.score for pair in whole.pairs]
    model = arms.Model(base, "hf", {}, batch_size=1)
    with pytest.raises(EvaluationError, match="one item in a batch"):
        model.halve()


def test_nan_is_said_and_never_a_gain(base, items, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from loopexport.cli.comparison_text import comparison_lines

    forward = HFLM._model_call

    def overflowing(self, inputs, **kwargs):
        return forward(self, inputs, **kwargs) * (float("nan") if self.model.config.loop_steps > 1 else 1)

    monkeypatch.setattr(HFLM, "_model_call", overflowing)
    result = plan_compare(base, MILD, items=items, **CPU).run()
    [row] = result.comparisons
    assert (row.loop, row.gained, row.base_nan, row.loop_nan) == (0, 0, 0, 30)
    assert "NaN in place of 30 answers of the loop, counted as wrong" in "\n".join(comparison_lines([row], None))
    export = convert(base, tmp_path / "export", span=MILD.span, steps=MILD.steps)
    assert result.save(export)
    assert "NaN and counted as wrong, 30 of the loop." in (export.root / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "f1"}, "has no metric 'f1'"),
        ({"metric": "acc,strict"}, "with filter none"),
        ({"seeds": (1, 2)}, "no task that samples"),
        ({"chat_template": True}, "chat template"),
        ({"generation": {"max_gen_toks": 5}}, "has no effect: no model generates text for mine; leave out"),
    ],
)
def test_what_cannot_be_scored_shows_before_the_loop_answers(base, items, monkeypatch, change, message):
    from loopexport.evaluation.arms import Model

    asked = []
    use = Model.use
    monkeypatch.setattr(Model, "use", lambda self, arm: asked.append(arm.name) or use(self, arm))
    with pytest.raises(EvaluationError, match=message):
        plan_compare(base, MILD, items=items, **{**CPU, **change}).run()
    assert "loop" not in asked


def test_an_error_of_the_model_is_one_line_with_its_arm(base, items, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    def fail(self, inputs, **kwargs):
        raise RuntimeError("probability tensor contains nan\nsecond line")

    monkeypatch.setattr(HFLM, "_model_call", fail)
    with pytest.raises(EvaluationError, match=r"base cannot answer: probability tensor.*float32") as error:
        plan_compare(base, MILD, items=items, **CPU).run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": {"pretrained": "another/model"}}, "cannot set 'pretrained'.*leave it out"),
        ({"model_args": {"peft": "adapter"}}, "would load another model"),
        ({"model_args": {"batch_size": 2}}, "--batch-size"),
        ({"model_args": {"x": {1}}}, "must have only text, finite numbers"),
        ({"generation": {"temperature": float("nan")}}, "must have only text, finite numbers"),
        ({"batch_size": "\u00b2"}, "must be auto or a number"),
    ],
)
def test_refuses_settings_of_another_model_or_without_a_record(base, items, change, message):
    with pytest.raises(EvaluationError, match=message):
        plan_compare(base, MILD, items=items, **{**CPU, **change})


def test_only_what_samples_is_asked_with_several_seeds(base, tmp_path):
    """lm-evaluation-harness generates greedily for do_sample=false, whatever the temperature."""
    path = tmp_path / "generated.jsonl"
    path.write_text(json.dumps({"prompt": "it is", "answer": "1"}) + "\n")
    with pytest.raises(EvaluationError, match="no task that samples"):
        plan_compare(base, MILD, items=path, seeds=(1, 2), generation={"temperature": 1.0}, **CPU).run()


def test_generated_answers_count_tokens_and_truncation(base, tmp_path):
    path = tmp_path / "generated.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"it is {i}", "answer": "1"}) + "\n" for i in range(4)))
    result = plan_compare(base, MILD, items=path, generation={"max_new_tokens": 5}, **CPU).run()
    assert result.settings["generation"] == {"max_gen_toks": 5}  # the name that wins over the task's own
    [row] = result.comparisons
    assert row.metric == "exact_match,line"
    for pair in result.pairs:
        assert pair.loop.loglikelihoods == ()
        assert pair.loop.truncated == (pair.loop.tokens >= 5)
    assert any(pair.loop.truncated for pair in result.pairs)


def test_seeds_need_a_task_that_samples(base, items, tmp_path):
    with pytest.raises(EvaluationError, match="no task that samples"):
        plan_compare(base, MILD, items=items, seeds=(1, 2), **CPU).run()
    path = tmp_path / "generated.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"it is {i}", "answer": "1"}) + "\n" for i in range(3)))
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    result = plan_compare(base, MILD, items=path, seeds=(1, 2), generation=sampled, **CPU).run()
    [row] = result.comparisons
    assert (row.n, row.seeds, row.method) == (3, 2, "bootstrap")
    texts = {seed: [pair.base.text for pair in result.pairs if pair.seed == seed] for seed in (1, 2)}
    assert texts[1] != texts[2]
    again = plan_compare(base, MILD, items=path, seeds=(1, 2), generation=sampled, **CPU).run()
    assert again.pairs == result.pairs


def test_chooses_few_shot_examples_once(base, items):
    result = plan_compare(base, MILD, items=items, num_fewshot=2, limit=5, **CPU).run()
    assert len(result.pairs) == 5
    assert all(pair.prompt.count("\n\n") == 2 for pair in result.pairs)


def test_a_chat_has_no_space_in_front_of_a_choice(base, tmp_path):
    """Like lm-evaluation-harness, which leaves its delimiter out there."""
    chatty = shutil.copytree(base, tmp_path / "chatty")
    template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}<assistant>"
    (chatty / "chat_template.jinja").write_text(template)
    plan = plan_compare(
        chatty, MILD, items=write_items(tmp_path / "mine.jsonl", 6), chat_template=True, num_fewshot=1, **CPU
    )
    [task] = plan.tasks.load()["tasks"].values()
    assert task.doc_to_choice(task.eval_docs[0]) == ["12345", "67890", "it"]
    pairs = plan.run().pairs
    assert all("<assistant>" in pair.prompt and "<assistant> " not in pair.prompt for pair in pairs)


def test_saves_into_an_export(base, items, tmp_path):
    from loopexport import open_export
    from loopexport.export.results_file import measured

    export = convert(base, tmp_path / "export", span=MILD.span, steps=MILD.steps)
    result = plan_compare(export.root, items=items, **CPU).run()
    assert result.save(export)
    [saved] = measured(open_export(export.root)).own
    assert [task.verdict for task in saved.tasks] == [row.verdict for row in result.comparisons]
    assert "mine" in (export.root / "README.md").read_text()


def started_as_one_of_two(rank, port, arguments, printed):
    """The command line in a process of its own, as `accelerate launch` starts it."""
    world = {"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    with printed.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "loopexport", "compare", *arguments],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def statuses(processes):
    """Exit status of each; one that does not end in time prints where it stands, and is stopped."""
    try:
        return [process.wait(timeout=240) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
        return [process.wait() for process in processes]


def test_processes_share_the_items(base, items, tmp_path):
    """Two processes, each with every second item, give what one process gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [base, "--span", "2:4", "--steps", "2", "--items", items, "--out", tmp_path / "out"]
    compute = [f"--{name.replace('_', '-')}={value}" for name, value in CPU.items()]
    files = [tmp_path / f"printed-{rank}" for rank in (0, 1)]
    found = statuses([started_as_one_of_two(rank, port, [*options, *compute], files[rank]) for rank in (0, 1)])
    printed = "".join(file.read_text() for file in files)
    assert found == [0, 0], printed
    assert printed.count("Model ") == 1
    assert printed.count("Wrote ") == 1
    pairs = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    alone = plan_compare(base, MILD, items=items, **CPU).run()
    assert [pair["item"] for pair in pairs] == [pair.item for pair in alone.pairs] == list(range(30))
    for ours, theirs in zip(pairs, alone.pairs, strict=True):
        assert ours["loop"]["loglikelihoods"] == pytest.approx(theirs.loop.loglikelihoods, abs=2e-5)
    assert all((tmp_path / "out" / f"answers-{rank}.jsonl").is_file() for rank in (0, 1))
