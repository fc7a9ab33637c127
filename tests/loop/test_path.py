"""Paths through the layers: every spelling, every mistake, and the spans that a path is equal to."""

from __future__ import annotations

import itertools

import pytest

from loopexport.errors import SpecError
from loopexport.loop.path import with_spans
from loopexport.loop.recipes import Recipe, overridden, parse_rys
from loopexport.loop.route import as_path, cache_slots, route
from loopexport.loop.spec import make_spec, parse_span
from support.random_paths import order_of_spans, random_path, runs_in

NUM_LAYERS = 7


@pytest.mark.parametrize(
    "path",
    [
        "0-14,12-39",
        "0..14,12..39",
        "0:15,12:40",
        " 0 - 14 , 12 .. 39 ",
        "0-14,12:15,15-39",
        ["0-14", "12:40"],
        ["0-14,12:15", (15, 40)],
        [[0, 15], [12, 40]],
        ((0, 15), (12, 40)),
        [*range(15), *range(12, 40)],
        ",".join(map(str, [*range(15), *range(12, 40)])),
        "layers:" + ",".join(map(str, [*range(15), *range(12, 40)])),
    ],
    ids=lambda value: str(value)[:30],
)
def test_every_spelling_of_a_path_is_the_same_path(path):
    spec = make_spec(path=path)
    assert spec.path == ((0, 15), (12, 40))
    assert (spec.steps, spec.kv) == (2, "per_step")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "path '' has '', which is no run of layers; write 0-14,12-39 (with the last layer) or 0:15"),
        ("0-14,", "has '', which is no run of layers"),
        ("0-14;12-39", "has '0-14;12-39', which is no run of layers"),
        ("0-14,-3", "has '-3', which is no run of layers"),
        ("0-14-15", "has '0-14-15', which is no run"),
        ("0-1.5", "has '0-1.5', which is no run"),
        ("0-\u0663", "has '0-\u0663', which is no run"),
        ((0, 5), "path (0, 5) may be one run or two layers: write [(0, 5)] for the half-open run, or '0,5' for"),
        ([0, 0], "path [0, 0] may be one run or two layers"),
        ("0-14,12-11", "has '12-11', which goes backwards or is empty; write the smaller layer first"),
        ("0:15,12:12", "has '12:12', which goes backwards or is empty"),
        ([[0, 15], [12, 12]], "has '12:12', which goes backwards or is empty"),
        ([], "path [] is no list of layers"),
        (7, "path 7 is no list of layers"),
        (b"0-14", "path b'0-14' is no list of layers"),
        ([0, 1, True], "has True, which is no run of layers"),
        ([0, -1], "has -1, which is no run of layers"),
        ([[0, 1, 2]], "has [0, 1, 2], which is no run of layers"),
        ([0.5], "has 0.5, which is no run of layers"),
        ([None], "has None, which is no run of layers"),
        ("1-4", "the path starts at layer 1; it must start at layer 0"),
        ("0-2,5-6,4", "the path first visits layer 4 after layer 6; layers can be visited again and left out, but not"),
        (f"0-{10**8}", f"the path visits {10**8 + 1} layers; 10000 are allowed"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_bad_paths_are_told_in_one_line(path, says):
    with pytest.raises(SpecError) as raised:
        make_spec(path=path)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"span": "1:3"}, "the loop has a span and a path; give one of them"),
        ({"steps": 3}, "a path says how often each layer runs, so steps is 2, or 1 for the base model, not 3"),
        ({"steps": 0}, "steps 0 must be a whole number from 1"),
        ({"damping": 0.5}, "a path runs each layer as it is, without damping; leave it out, or give spans"),
        ({"anchor": 0.5}, "without anchor"),
        ({"mode": "layer"}, "without mode"),
        ({"rule": "heun"}, "without rule"),
    ],
    ids=str,
)
def test_a_path_has_no_fields_of_spans(fields, says):
    with pytest.raises(SpecError, match=says):
        make_spec(path="0-3,1-5", **fields)


@pytest.mark.parametrize(
    ("path", "spans", "steps", "mode"),
    [
        ("0-3,2-6", (2, 4), 2, "block"),
        ("0-3,2-3,2-6", (2, 4), 3, "block"),
        ("0-1,0-1,2-4,3-4,3-6", ((0, 2), (3, 5)), (2, 3), "block"),
        ("0-6,0-6", (0, 7), 2, "block"),
        ("0-2,2-6", (2, 3), 2, "block"),
        ("0,1,1,2,2,3,4,5,6", (1, 3), 2, "layer"),
        ("0,0,0,1,1,1,2,3,3,3,4-6", ((0, 2), (3, 4)), 3, "layer"),
        ("0,1,1,2,2,2,3-6", ((1, 2), (2, 3)), (2, 3), "block"),
        ("0-2,1-2,3,3-6", ((1, 3), (3, 4)), 2, "block"),
        ("0-3,2-5,4-6", ((2, 4), (4, 6)), 2, "block"),
    ],
)
def test_paths_are_told_as_spans(path, spans, steps, mode):
    spec = with_spans(make_spec(path=path), NUM_LAYERS)
    assert (spec.path, spec.span, spec.steps, spec.mode) == (None, spans, steps, mode)
    assert (spec.step_size, spec.kv) == (1.0, "per_step")


@pytest.mark.parametrize("path", ["0-3,1-2,4-6", "0-3,2-4,3-6,1-6", "0-3,2-4,2-6", "0-4,6", "0-3,2-5"])
def test_paths_that_spans_cannot_tell_stay_paths(path):
    spec = make_spec(path=path)
    assert with_spans(spec, NUM_LAYERS) is spec


def test_the_path_of_the_base_is_refused_and_steps_1_is_not():
    with pytest.raises(SpecError, match="the path 0-6 runs every layer once, as the base model does; repeat layers"):
        with_spans(make_spec(path="0-3,4-6"), NUM_LAYERS)
    assert with_spans(make_spec(path="0-6", steps=1), NUM_LAYERS).is_identity


def visits(spec, num_layers):
    """The layers that a spec without blends visits, in order, by its fields alone."""
    if spec.path is not None:
        return [layer for start, stop in spec.path for layer in range(start, stop)]
    return order_of_spans(spec.spans, spec.steps_of_spans, num_layers, spec.mode)


@pytest.mark.parametrize("leaves_out", [False, True])
def test_spans_visit_what_the_path_visits(leaves_out):
    reduced = 0
    for seed in range(400):
        order = random_path(seed, NUM_LAYERS, leaves_out=leaves_out)
        if order == list(range(NUM_LAYERS)):
            continue
        path = make_spec(path=runs_in(order))
        spec = with_spans(path, NUM_LAYERS)
        assert visits(spec, NUM_LAYERS) == order
        assert spec.layer_runs(NUM_LAYERS) == path.layer_runs(NUM_LAYERS) == [order.count(i) for i in range(NUM_LAYERS)]
        assert cache_slots(spec, NUM_LAYERS) == len(order)
        assert as_path(spec, NUM_LAYERS) == tuple(runs_in(order))
        assert sum(stretch.evaluations for stretch in route(spec, NUM_LAYERS)) == len(order)
        reduced += spec.path is None
    assert reduced == 0 if leaves_out else 50 < reduced < 350


def test_spans_that_exist_are_found():
    """Every loop of up to two spans, told as a path, comes back by spans that visit the same layers."""
    spans = [(start, stop) for start, stop in itertools.combinations(range(6), 2)]
    for chosen in [(span,) for span in spans] + [(a, b) for a in spans for b in spans if a[1] <= b[0]]:
        for steps in itertools.product((2, 3), repeat=len(chosen)):
            order = order_of_spans(chosen, steps, 6)
            spec = with_spans(make_spec(path=runs_in(order)), 6)
            assert spec.path is None, (chosen, steps)
            assert visits(spec, 6) == order


@pytest.mark.parametrize("pair", ["12,15", "(12, 15)", " 12 , 15 ", (12, 15), [12, 15]])
def test_rys_pairs_are_read_in_every_spelling(pair):
    assert parse_rys(pair) == (12, 15)


def test_rys_pair_runs_the_layers_of_its_definition():
    for i, j in itertools.combinations(range(NUM_LAYERS + 1), 2):
        order = [*range(j), *range(i, NUM_LAYERS)]
        spec = make_spec(**Recipe({"rys": (i, j)}).fields)
        assert (spec.steps, spec.kv) == (2, "per_step")
        assert visits(spec, NUM_LAYERS) == order
        assert with_spans(make_spec(path=runs_in(order)), NUM_LAYERS) == spec


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("15,12", "rys 15,12 runs no layer twice: give I < J"),
        ((3, 3), "rys 3,3 runs no layer twice"),
        ("0,0", "rys 0,0 runs no layer twice: that is the base model"),
        ("\u0661,\u0663", "rys '\u0661,\u0663' is not I,J"),
        ("12-15", "rys '12-15' is not I,J, two layer numbers such as 12,15"),
        ((1, 2, 3), "is not I,J"),
        ((-1, 2), "is not I,J"),
        ((True, 2), "is not I,J"),
        (7, "rys 7 is not I,J"),
    ],
)
def test_bad_rys_pairs_are_told(pair, says):
    with pytest.raises(SpecError) as raised:
        parse_rys(pair)
    assert says in str(raised.value)


def test_each_span_may_have_its_own_steps():
    spec = make_spec(span=["1:3x2", " 4:6 x 3 "])
    assert (spec.spans, spec.steps, spec.step_size) == (((1, 3), (4, 6)), (2, 3), (1 / 2, 1 / 3))
    assert make_spec(span="1:3x2").steps == make_spec(span=["1:3x2", "4:6x2"]).steps == 2
    assert make_spec(span=["1:3", "4:6"], steps=[2, 3]) == spec
    for fields, says in (
        ({"span": "1:3x2", "steps": 3}, "steps 3 and a span with its own number of steps were given"),
        ({"span": ["1:3x2", "4:6"]}, "write all of them as 8:12x2"),
        ({"span": "1-3x2"}, "span '1-3x2' is ambiguous; for layers 1 to 3 write 1:4x2 [(]half-open[)]"),
        ({"span": "\u0661:\u0663", "steps": 2}, "is not START:STOP"),
        ({"span": "1:3x\u0662"}, "is not START:STOP"),
        ({"span": "1:3x", "steps": 2}, "is not START:STOP"),
        ({"span": "x2", "steps": 2}, "is not START:STOP"),
        ({"span": "1:3"}, "has no steps"),
        ({"span": ["1:3", "4:6"], "steps": [2, 3, 4]}, "3 numbers of steps for 2 spans"),
    ):
        with pytest.raises(SpecError, match=says):
            make_spec(**fields)


@pytest.mark.parametrize("span", ["2:4X2", "2:4x", "2:4x-2", "2:4x2.5", "autox2", "2:4x2x3", "2,4x2", "2:4 2"])
@pytest.mark.parametrize("steps", [None, 2])
def test_a_misspelt_k_is_told_with_the_span_as_given(span, steps):
    for given in (span, ["0:1x2", span]):
        with pytest.raises(SpecError) as raised:
            make_spec(span=given, steps=steps)
        assert str(raised.value).startswith(f"span {span!r} is not START:STOP or START:STOPxK, such as")


def test_a_span_alone_has_no_k():
    assert parse_span(" 2:4 ") == (2, 4)
    for text in ("2:4x2", "2-4x2", "2:4x"):
        with pytest.raises(SpecError, match=f"span '{text}' is "):
            parse_span(text)


def test_two_neighbours_in_a_list_are_layers():
    assert make_spec(path=[0, 1]).path == ((0, 2),)
    assert make_spec(path=[(0, 5), (3, 6)]).path == ((0, 5), (3, 6))
    assert make_spec(path=[(0, 5)]).path == ((0, 5),)
    assert make_spec(path="0,5").path == ((0, 1), (5, 6))


@pytest.mark.parametrize("steps", [2, 3, [2, 2], (1, 2), 0])
def test_steps_beside_a_path_are_refused(steps):
    for place in ({"path": "0-3,2-5"}, {"from_mergekit": "nowhere.yml"}):
        with pytest.raises(SpecError) as raised:
            Recipe({**place, "steps": steps})
        assert f"steps {steps!r} and {next(iter(place))} were given" in str(raised.value)
        assert "leave steps out" in str(raised.value)
    assert Recipe({"path": "0-3,2-5", "steps": 1}).fields["steps"] == 1


def test_a_given_place_hides_the_places_below_and_their_fields():
    below = {"span": "1:3", "steps": 4, "anchor": 0.5, "kv": "reference", "decode": "first_n", "first_n": 2}
    kept = {"decode": "first_n", "first_n": 2}
    for place in ({"path": "0-3,2-5"}, {"rys": "1,3"}, {"from_mergekit": "x.yml"}):
        assert overridden(below, place) == {**kept, **place}
        assert overridden({**kept, "preset": "x", "kv": "shared"}, place) == {**kept, **place}
        assert overridden({"kv": "shared"}, place) == {"kv": "shared", **place}
        assert overridden({**place, "kv": "shared"}, {"span": "1:3", "steps": 2}) == {"span": "1:3", "steps": 2}
    assert overridden({"rys": "1,3", "damping": 0.5}, {"rys": "2,4"}) == {"rys": "2,4", "damping": 0.5}
    assert overridden({"span": "1:3"}, {"preset": "x"}) == {"span": "1:3", "preset": "x"}


def test_a_given_span_hides_the_places_below_and_their_steps():
    below = {"span": "1:3", "steps": 4, "anchor": 0.5}
    assert overridden(below, {"steps": 5}) == {"span": "1:3", "steps": 5, "anchor": 0.5}
    assert overridden(below, {"span": "2:4"}) == {"span": "2:4", "steps": 4, "anchor": 0.5}
    assert overridden(below, {"span": ["2:4x3"]}) == {"span": ["2:4x3"], "anchor": 0.5}
    assert overridden({"preset": "x"}, {"span": "1:3"}) == {"preset": "x", "span": "1:3"}
    assert overridden({"path": "0-3,2-5"}, {"span": "1:3", "steps": 2}) == {"span": "1:3", "steps": 2}


def test_many_steps_are_counted_at_once():
    spec = make_spec(span="1:3", steps=2**31 - 1, kv="per_step", damping=1.0)
    assert cache_slots(spec, NUM_LAYERS) == NUM_LAYERS + 2 * (2**31 - 2)
    assert route(spec, NUM_LAYERS)[1].times == 2**31 - 2
    assert as_path(spec, NUM_LAYERS) is None


@pytest.mark.parametrize("place", [{"path": "0-3,2-5"}, {"rys": "2,4"}, {"from_mergekit": "x.yml"}])
def test_a_preset_has_a_span_of_its_own(place):
    with pytest.raises(SpecError, match="and preset qwen3-4b-mmlu-pro both say which layers loop; give one of them"):
        Recipe(place, "qwen3-4b-mmlu-pro")
