"""Results carry their uncertainty, refuse to be numbers when they are not, and survive JSON and HTML."""

from __future__ import annotations

import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest

from dyntune.errors import DyntuneError, InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.records import Estimate, Recommendation, Status

INF, NAN = math.inf, math.nan


def estimate(**changes) -> Estimate:
    fields = {
        "value": 2.0,
        "low": 1.5,
        "high": 2.5,
        "level": 0.95,
        "unit": "loss / parameter^2",
        "method": "Lanczos",
        "covers": "numerical",
    }
    return Estimate(**(fields | changes))


def refused_estimate() -> Estimate:
    return estimate(value=None, low=-INF, high=INF, level=None, status=Status.REFUSED, reason="no data")


def recommendation(**changes) -> Recommendation:
    fields = {
        "knob": "learning rate",
        "value": 3.1e-3,
        "low": 1.2e-3,
        "high": 6.0e-3,
        "level": 0.9,
        "status": Status.OK,
        "rule": "half the edge",
        "sources": ("Cohen et al. (2021), arXiv:2103.00065",),
        "evidence": {"sharpness": estimate(), "ratio": 0.25, "optimizer": "adamw", "noise": None},
        "checks": ("trained 20 steps without divergence",),
        "cost": 187.4,
        "max_stable": estimate(value=0.019, low=0.01, high=0.03, unit="1"),
        "warmup_steps": 40,
        "series": {"loss": (3.0, 2.5, 2.0)},
    }
    return Recommendation(**(fields | changes))


def refused() -> Recommendation:
    return recommendation(
        value=None, low=0.0, high=INF, level=None, status=Status.REFUSED, reason="the loss is NaN", max_stable=None
    )


def strict_json(record: Estimate | Recommendation) -> dict:
    """Through RFC 8259 JSON, which has neither NaN nor Infinity, and back."""
    return json.loads(json.dumps(record.to_dict(), allow_nan=False))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_result_is_a_number():
    assert float(estimate()) == 2.0
    assert float(recommendation()) == 3.1e-3


def test_a_refused_result_is_not():
    with pytest.raises(RefusedError, match="this estimate was refused and has no value: no data") as caught:
        float(refused_estimate())
    assert caught.value.partial == refused_estimate()
    with pytest.raises(RefusedError, match="no learning rate was recommended: the loss is NaN") as caught:
        float(refused())
    assert caught.value.partial == refused()


@pytest.mark.parametrize("truth", [1.5, 2.0, 2.5])
def test_an_interval_holds_its_ends(truth):
    assert truth in estimate()


@pytest.mark.parametrize("truth", [1.49, 2.51, NAN])
def test_and_nothing_beyond(truth):
    assert truth not in estimate()


def test_an_unbounded_interval_holds_every_number():
    assert -1e300 in refused_estimate()


@pytest.mark.parametrize("ends", [(2.1, 3.0), (1.0, 1.9), (3.0, 1.0), (NAN, 3.0), (1.0, NAN)])
def test_an_interval_without_its_value_is_refused(ends):
    with pytest.raises(InvalidArgumentError, match=r"value=2\.0 lies outside \[low=.*an interval must hold its own"):
        estimate(low=ends[0], high=ends[1])


def test_nan_is_no_value():
    with pytest.raises(InvalidArgumentError, match="value=nan lies outside"):
        estimate(value=NAN)


@pytest.mark.parametrize("record", [estimate(), recommendation()])
def test_results_do_not_change(record):
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.value = 5.0


# -- words -------------------------------------------------------------------------------------------------------------


def test_an_estimate_in_words():
    assert str(estimate()) == "2 (1.5 .. 2.5) loss / parameter^2"
    late = estimate(status=Status.NOT_CONVERGED, reason="40 products did not settle it")
    assert str(late) == "2 (1.5 .. 2.5) loss / parameter^2 [not_converged: 40 products did not settle it]"
    assert str(refused_estimate()) == "refused: no data"


def test_a_recommendation_in_words():
    assert str(recommendation()) == "3.1e-3 (1.2e-3 .. 6e-3), stable up to 0.019, warm up 40 steps"
    assert str(recommendation(max_stable=None, warmup_steps=None)) == "3.1e-3 (1.2e-3 .. 6e-3)"
    assert str(recommendation(max_stable=refused_estimate(), warmup_steps=0)) == "3.1e-3 (1.2e-3 .. 6e-3)"
    unsure = recommendation(status=Status.ONE_BATCH, reason="one batch")
    assert str(unsure).endswith("warm up 40 steps [one_batch: one batch]")
    assert str(refused()) == "learning rate: refused. the loss is NaN"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (-0.5, "-0.5"),
        (0.1, "0.1"),
        (1 / 3, "0.333"),
        (123.456, "123"),
        (999.4, "999"),
        (999.6, "1e3"),
        (1234.5, "1.23e3"),
        (9999.6, "1e4"),
        (0.01, "0.01"),
        (0.00996, "9.96e-3"),
        (0.009999, "0.01"),
        (3.1e-3, "3.1e-3"),
        (-2.5e-7, "-2.5e-7"),
        (1e-300, "1e-300"),
        (INF, "inf"),
        (-INF, "-inf"),
    ],
)
def test_numbers_are_as_short_as_they_can_be(value, shown):
    assert str(estimate(value=value, low=-INF, high=INF)).split()[0] == shown
    assert f"  number: {shown}" in recommendation(evidence={"number": value}).explain().splitlines()


def test_the_whole_chain():
    assert recommendation().explain().splitlines() == [
        "learning rate: 3.1e-3 (1.2e-3 .. 6e-3), stable up to 0.019, warm up 40 steps",
        f"status: OK: {Status.OK.value}",
        "rule: half the edge",
        "evidence:",
        "  sharpness: 2 (1.5 .. 2.5) loss / parameter^2",
        "  ratio: 0.25",
        "  optimizer: adamw",
        "  noise: None",
        "check: trained 20 steps without divergence",
        "coverage of the range: 90%",
        "cost: 187 gradient-equivalents",
        "source: Cohen et al. (2021), arXiv:2103.00065",
    ]


@pytest.mark.parametrize(
    ("level", "shown"),
    [(None, "not calibrated yet"), (0.5, "50%"), (0.995, "99.5%"), (1 - 1e-4, "99.99%"), (1.0, "100%")],
)
def test_coverage_is_not_rounded_up_to_certainty(level, shown):
    assert f"coverage of the range: {shown}" in recommendation(level=level).explain().splitlines()


def test_a_reason_stands_in_for_the_general_advice():
    lines = recommendation(status=Status.UNCERTAIN, reason="two pilots disagree").explain().splitlines()
    assert "status: UNCERTAIN: two pilots disagree" in lines
    assert f"status: UNCERTAIN: {Status.UNCERTAIN.value}" in recommendation(status=Status.UNCERTAIN).explain()


# -- strictness --------------------------------------------------------------------------------------------------------


def test_require_returns_what_is_established():
    record = recommendation()
    assert record.require() is record


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.OK])
@pytest.mark.parametrize("reason", ["", "because"])
def test_require_raises_with_the_partial_result(status, reason):
    record = dataclasses.replace(
        refused() if status is Status.REFUSED else recommendation(), status=status, reason=reason
    )
    expected = RefusedError if status is Status.REFUSED else NotConvergedError
    with pytest.raises(expected) as caught:
        record.require()
    assert isinstance(caught.value, DyntuneError)
    assert str(caught.value) == f"learning rate: {status.name}: {reason or status.value}"
    assert caught.value.partial is record


def test_require_needs_a_value_whatever_the_status():
    with pytest.raises(RefusedError):
        recommendation(value=None).require()


# -- status ------------------------------------------------------------------------------------------------------------


def test_every_status_has_its_own_advice():
    assert len({s.value for s in Status}) == len(Status.__members__) == 5
    assert all(s.value.endswith(".") for s in Status)


def test_only_a_refusal_comes_without_a_value():
    assert [s for s in Status if not s.usable] == [Status.REFUSED]


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (Status.ONE_BATCH, "Pass a DataLoader"),
        (Status.NOT_CONVERGED, "Raise `max_products`"),
        (Status.UNCERTAIN, "explain"),
    ],
)
def test_advice_says_what_to_do(status, remedy):
    assert remedy in status.value


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_an_estimate_through_json():
    data = strict_json(estimate(status=Status.NOT_CONVERGED, reason="why", num_products=7))
    assert data.pop("status") == "NOT_CONVERGED"
    assert Estimate(**data, status=Status.NOT_CONVERGED) == estimate(
        status=Status.NOT_CONVERGED, reason="why", num_products=7
    )


def test_infinite_ends_become_null():
    assert [strict_json(refused_estimate())[key] for key in ("value", "low", "high", "level")] == [None] * 4
    assert strict_json(estimate(low=-INF))["low"] is None


def test_a_recommendation_through_json():
    data = strict_json(recommendation())
    assert {f.name for f in dataclasses.fields(Recommendation)} == data.keys()
    assert data["status"] == "OK"
    assert data["evidence"] == {
        "sharpness": estimate().to_dict(),
        "ratio": 0.25,
        "optimizer": "adamw",
        "noise": None,
    }
    assert data["max_stable"]["value"] == 0.019
    assert data["series"] == {"loss": [3.0, 2.5, 2.0]}
    assert (data["sources"], data["checks"]) == (list(recommendation().sources), list(recommendation().checks))


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_no_number_that_json_lacks_gets_out(number):
    data = strict_json(
        recommendation(
            low=number,
            high=number,
            level=number,
            cost=number,
            evidence={"x": number},
            series={"loss": (1.0, number)},
            max_stable=estimate(low=-INF, high=INF),
        )
    )
    assert [data[key] for key in ("low", "high", "level", "cost")] == [None] * 4
    assert data["evidence"] == {"x": None}
    assert data["series"] == {"loss": [1.0, None]}


def test_a_refusal_through_json():
    data = strict_json(refused())
    assert (data["value"], data["high"], data["status"], data["reason"]) == (None, None, "REFUSED", "the loss is NaN")
    assert data["max_stable"] is None


# -- HTML --------------------------------------------------------------------------------------------------------------

PAYLOADS = ["<script>alert(1)</script>", "</pre><img src=x onerror=alert(1)>", "a & b", "\"'><b>"]


class Page(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("payload", PAYLOADS)
def test_html_shows_names_and_never_runs_them(payload):
    record = recommendation(
        knob=payload,
        rule=payload,
        reason=payload,
        status=Status.UNCERTAIN,
        sources=(payload,),
        checks=(payload,),
        evidence={payload: payload, "estimate": estimate(unit=payload)},
    )
    page = Page()
    page.feed(record._repr_html_())
    assert page.tags == ["pre"]
    assert page.text == record.explain()
    assert page.text.count(payload) >= 7
