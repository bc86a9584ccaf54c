from proxstep.lab.samples import first_samples
from proxstep.runs.reading import load_run


def row(step, prompt, completion, reward, answer="4"):
    return {
        "step": step,
        "prompt": prompt,
        "completion": completion,
        "reward": reward,
        "answer": answer,
    }


def test_first_and_last_completion_of_a_prompt_stand_side_by_side(make_run):
    rows = [row(0, "2+2=", "5", 0.0), row(0, "1+3=", "4", 1.0)]
    rows += [row(3, "2+2=", "3", 0.25), row(6, "2+2=", "4", 1.0), row(6, "new", "?", None)]
    found = first_samples([load_run(make_run(seed=0)), load_run(make_run(seed=1, samples=rows))])
    assert found is not None
    assert found.seed == 1
    both, single = found.shown
    assert (both.prompt, both.answer) == ("2+2=", "4")
    before, after = both.written
    assert (before.when, before.text, before.grade, before.full) == ("before training", "5", "0", 0)
    assert (after.when, after.text, after.grade, after.full) == ("after step 6", "4", "1", True)
    assert [(w.text, w.grade) for w in single.written] == [("?", "\N{EN DASH}")]


def test_samples_of_step_0_alone_are_shown_once(make_run):
    found = first_samples([load_run(make_run(samples=[row(0, "2+2=", "5", 0.0)]))])
    assert found is not None
    assert [len(sample.written) for sample in found.shown] == [1]


def test_long_completions_are_cut_and_say_so(make_run):
    rows = [row(1, f"{i}", "x" * 4000, 1) for i in range(20)]
    found = first_samples([load_run(make_run(samples=rows))])
    assert found is not None
    assert len(found.shown) == 6
    assert found.shown[0].written[0].text.endswith("xx… (2,500 more)")


def test_nothing_kept_shows_nothing(make_run):
    assert first_samples([load_run(make_run())]) is None
