"""MixtureModel: any family, frames of mixed types."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score

from stream_em import (
    BatchEM,
    Bernoulli,
    Categorical,
    Exponential,
    Gaussian,
    Mixture,
    Poisson,
    Product,
    Schema,
    SchemaError,
)
from stream_em.sklearn import MixtureModel

GENERATOR = np.random.default_rng(11)
LABELS = GENERATOR.integers(2, size=600)
FRAME = pd.DataFrame(
    {
        "amount": GENERATOR.normal(size=600) + 3.0 * LABELS,
        "hour": GENERATOR.normal(size=600),
        "country": pd.Categorical(np.where(GENERATOR.random(600) < 0.9, np.where(LABELS, "DE", "FR"), "IT")),
        "plan": np.where(GENERATOR.random(600) < 0.5, "free", "paid"),
        "returned": GENERATOR.random(600) < np.where(LABELS, 0.1, 0.8),
        "items": GENERATOR.poisson(np.where(LABELS, 1.0, 9.0)),
        "seconds": GENERATOR.exponential(np.where(LABELS, 1.0, 60.0)),
    }
)
CHOSEN = {"items": "poisson", "seconds": "exponential"}
FORMS = {"pandas": lambda one: one, "polars": pl.from_pandas, "arrow": lambda one: pa.Table.from_pandas(one)}


@pytest.mark.parametrize("form", FORMS)
def test_the_type_of_a_column_picks_its_family(form: str) -> None:
    frame = FORMS[form](FRAME)
    model = MixtureModel(2, families=CHOSEN, random_state=0).fit(frame)
    assert model.family_ == Product(
        {
            ("amount", "hour"): Gaussian(),
            "country": Categorical(),
            "plan": Categorical(),
            "returned": Bernoulli(),
            "items": Poisson(),
            "seconds": Exponential(),
        }
    )
    assert model.n_features_in_ == 7
    assert model._fitted()._known_schema().names == tuple(FRAME.columns)
    assert adjusted_rand_score(LABELS, model.predict(frame)) > 0.95
    np.testing.assert_array_equal(model.fit_predict(frame), model.predict(frame))
    reference = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME)
    np.testing.assert_allclose(model.score_samples(frame), reference.score_samples(FRAME), rtol=1e-12)


def test_it_is_the_engine_that_answers() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0, tol=1e-9, max_iter=300).fit(FRAME)
    schema = Schema(
        {"amount": "numeric", "hour": "numeric", "country": "category", "plan": "category", "returned": "flag"}
        | {"items": "count", "seconds": "duration"}
    )
    engine = BatchEM(Mixture(model.family_, 2), schema=schema, tol=1e-9, max_iter=300).fit(FRAME)
    assert model.score(FRAME) == pytest.approx(float(engine.log_prob(FRAME).mean()), rel=1e-6)
    assert model.bic(FRAME) == pytest.approx(engine.bic(FRAME), rel=1e-6)
    assert model.aic(FRAME) == pytest.approx(engine.aic(FRAME), rel=1e-6)
    assert (np.diff(model.lower_bounds_) > -1e-9).all()


def test_families_may_be_objects_and_groups() -> None:
    families = {("amount", "hour"): Gaussian("diag"), "items": Poisson(), "seconds": Gaussian("spherical")}
    model = MixtureModel(2, families=families, random_state=0).fit(FRAME)
    chosen = model.family_.families  # type: ignore[attr-defined]
    assert chosen["amount", "hour"] == Gaussian("diag")
    assert (chosen["items"], chosen["seconds"]) == (Poisson(), Gaussian("spherical"))
    assert chosen["country"] == Categorical()
    alone = MixtureModel(2, families={"a": Poisson()}).fit(FRAME[["items"]].rename(columns={"items": "a"}))
    assert adjusted_rand_score(LABELS, alone.predict(FRAME[["items"]].rename(columns={"items": "a"}))) > 0.5


ZIPS = GENERATOR.integers(3, size=400) + 10_000
VALUES = GENERATOR.normal(size=400) + 9.0 * (ZIPS == 10_000)


@pytest.mark.parametrize("kind", ["categorical", "dictionary", "named", "named polars", "named arrow"])
def test_whole_numbers_may_be_categories(kind: str) -> None:
    text = pd.DataFrame({"zip": ZIPS.astype(str), "value": VALUES})
    frame: Any = pd.DataFrame({"zip": ZIPS, "value": VALUES})
    families = {"zip": "categorical"} if kind.startswith("named") else None
    if kind == "categorical":
        frame = frame.astype({"zip": "category"})
    elif kind == "dictionary":
        chunks = [pa.array(part).dictionary_encode() for part in np.array_split(ZIPS, 3)]
        frame = pa.table({"zip": pa.chunked_array(chunks), "value": VALUES})
    elif kind != "named":
        frame = FORMS[kind.split()[1]](frame)
    reference = MixtureModel(2, random_state=0).fit(text)
    model = MixtureModel(2, families=families, random_state=0).fit(frame)
    assert set(model._learner._known_schema().fields[0].categories) == {"10000", "10001", "10002"}
    np.testing.assert_array_equal(model.predict_proba(frame), reference.predict_proba(text))
    # The type of a column may be another in another call: its categories are the same text.
    others = (text, pd.DataFrame({"zip": ZIPS, "value": VALUES}), frame)
    for other in others:
        np.testing.assert_array_equal(model.score_samples(other), reference.score_samples(text))
    for other in others:
        model.partial_fit(other)
    assert len(model._learner._known_schema().fields[0].categories) == 3
    given = model.conditional({"zip": 10_000}).parameters
    np.testing.assert_array_equal(given.weights, model.conditional({"zip": "10000"}).parameters.weights)


def test_booleans_may_be_categories_and_missing_stays_missing() -> None:
    flags = pd.DataFrame({"paid": pd.Categorical([True, False, None, True] * 30), "x": np.arange(120.0)})
    model = MixtureModel(1).fit(flags)
    assert model._learner._known_schema().fields[0].categories == ("True", "False")
    share = model.conditional({"x": 0.0}).log_prob([{"paid": "True"}])
    assert np.exp(share)[0] == pytest.approx(2 / 3, abs=0.01)
    gap = flags.iloc[[2]]
    np.testing.assert_allclose(model.score_samples(gap), model.marginal(["x"]).log_prob([{"x": 2.0}]), rtol=1e-12)
    zips = pd.DataFrame({"zip": pd.array([1, 2, None, 1] * 30, dtype="Int64")})
    named = MixtureModel(1, families={"zip": "categorical"}).fit(zips)
    assert named._learner._known_schema().fields[0].categories == ("1", "2")
    np.testing.assert_allclose(named.score_samples(zips.iloc[[2]]), 0.0, atol=1e-12)


def test_a_categorical_of_numbers_may_be_a_number() -> None:
    frame = pd.DataFrame({"n": pd.Categorical([1, 2, 3, 9] * 20)})
    model = MixtureModel(1, families={"n": "poisson"}).fit(frame)
    assert model.parameters_[0].mean[0, 0] == pytest.approx(15 / 4, rel=1e-3)


@pytest.mark.parametrize("floats", [pd.Series([1.0, 2.5]), pd.Series([1.0, 2.5]).astype("category")])
def test_floats_are_no_categories(floats: pd.Series) -> None:
    frame = pd.DataFrame({"size": floats, "x": [1.0, 2.0]})
    with pytest.raises(SchemaError, match=r"column 'size' has type .*, but the field is a category: .*\.astype\(str\)"):
        MixtureModel(families={"size": "categorical"}).fit(frame)
    model = MixtureModel(families={"size": "categorical"}).fit(frame.assign(size=frame["size"].astype(str)))
    with pytest.raises(SchemaError, match=r"\.astype\(str\)"):
        model.predict(frame)


def test_samples_may_be_dicts() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME)
    events = FRAME.to_dict("records")
    np.testing.assert_array_equal(model.predict(events), model.predict(FRAME))
    np.testing.assert_array_equal(model.predict(events[3]), model.predict(FRAME.iloc[[3]]))
    turned = [dict(reversed(event.items())) for event in events]
    np.testing.assert_array_equal(model.score_samples(turned), model.score_samples(FRAME))
    for gap in ({"country": "DE", "amount": None}, {"amount": float("nan"), "country": "DE"}, {"country": "DE"}):
        expected = model.marginal(["country"]).log_prob({"country": "DE"})
        np.testing.assert_allclose(model.score_samples(gap), expected, rtol=1e-9)
    again = MixtureModel(2, families=CHOSEN, random_state=0).fit(events)
    np.testing.assert_array_equal(again.predict(FRAME), model.predict(FRAME))
    assert again.partial_fit(events).n_samples_seen_ == 1_200
    with pytest.raises(ValueError, match="unseen at fit time:\n- extra"):
        model.predict({"extra": 1.0})
    with pytest.raises(ValueError, match="column 'amount' holds values of different or unknown types"):
        model.predict([{"amount": 1.0}, {"amount": "x"}])
    with pytest.raises(TypeError, match="sample 1 is 3, expected a mapping"):
        model.predict([{"amount": 1.0}, 3])
    with pytest.raises(TypeError, match="named by strings, got 0"):
        model.predict({0: 1.0})


def test_arrays_have_columns_too() -> None:
    counts = FRAME[["items"]].to_numpy()
    model = MixtureModel(2, families={"x0": "poisson"}, random_state=0).fit(counts)
    assert model.family_ == Product({"x0": Poisson()})
    drawn, labels = model.sample(50)
    assert drawn.shape == (50, 1)
    assert set(labels.tolist()) <= {0, 1}
    np.testing.assert_array_equal(drawn, np.rint(drawn))


def test_missing_values_and_missing_rows() -> None:
    generator = np.random.default_rng(1)
    gaps = FRAME.astype({"returned": "boolean", "items": "Int64"}).mask(generator.random(FRAME.shape) < 0.3)
    gaps.iloc[5] = None
    model = MixtureModel(2, families=CHOSEN, random_state=0).fit(gaps)
    assert adjusted_rand_score(LABELS, model.predict(FRAME)) > 0.9
    nothing = gaps.iloc[[5]]
    np.testing.assert_allclose(model.predict_proba(nothing)[0], model.weights_, rtol=1e-9)
    np.testing.assert_allclose(model.score_samples(nothing), 0.0, atol=1e-12)


def test_weights_are_repeated_rows() -> None:
    weight = np.random.default_rng(2).integers(0, 4, size=600)
    weighted = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME, sample_weight=weight)
    repeated = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME.loc[FRAME.index.repeat(weight)])
    np.testing.assert_allclose(weighted.predict_proba(FRAME), repeated.predict_proba(FRAME), atol=1e-7)


def test_a_stream_of_frames_meets_new_categories() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0)
    for start in range(0, 600, 100):
        piece = FRAME.iloc[start : start + 100]
        model.partial_fit(piece)
    known = model.score(FRAME)
    new = FRAME.iloc[:200].assign(country="ES")
    before = model.score(new)
    model.partial_fit(new).partial_fit(new)
    assert model.score(new) > before
    assert np.isfinite(known)
    assert model.n_samples_seen_ == 1_000


def test_categories_beyond_the_vocabulary_are_other() -> None:
    frame = pd.DataFrame({"c": [f"c{row % 40}" for row in range(400)]})
    few = MixtureModel(1, max_categories=3).fit(frame)
    many = MixtureModel(1, max_categories=40).fit(frame)
    assert few.score(frame) == pytest.approx(0.075 * np.log(0.025) + 0.925 * np.log(0.925), abs=1e-3)
    assert many.score(frame) == pytest.approx(np.log(0.025), abs=1e-3)
    unseen = pd.DataFrame({"c": ["never seen"]})
    assert few.score(unseen) > many.score(unseen)


def test_a_vocabulary_that_overflows_is_warned_of_once_and_by_name() -> None:
    few = pd.DataFrame({"shop": ["a", "b", "c"] * 40, "id": [f"i{row % 3}" for row in range(120)]})
    many = few.assign(id=[f"i{row}" for row in range(120)])
    for learn in (lambda one: one.fit(many), lambda one: one.partial_fit(few).partial_fit(many).partial_fit(many)):
        with pytest.warns(UserWarning, match="column 'id' has more than 3 categories") as caught:
            model = learn(MixtureModel(1, max_categories=3, random_state=0))
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert all(hint in str(caught[0].message) for hint in ("convert", "leave it out", "raise max_categories"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.predict(many)
            model.partial_fit(many)
            MixtureModel(1, max_categories=3, random_state=0).fit(few)


def test_other_columns_are_refused_and_leave_the_model_untouched() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0).partial_fit(FRAME)
    before = pickle.dumps(model)
    wrong: dict[str, Any] = {
        "yet now missing:\n- hour": FRAME.drop(columns="hour"),
        "unseen at fit time:\n- extra": FRAME.assign(extra=1.0),
        "same order": FRAME[FRAME.columns[::-1]],
        "event 0, field 'items': got 0.5": FRAME.assign(items=0.5),
        "field 'amount': got 'x'": FRAME.assign(amount="x"),
    }
    for message, frame in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.partial_fit(frame)
        assert pickle.dumps(model) == before


def test_wrong_families_name_the_column() -> None:
    with pytest.raises(SchemaError, match="no field 'item'"):
        MixtureModel(families={"item": "poisson"}).fit(FRAME)
    with pytest.raises(ValueError, match="the family of column 'items' is 'poison', expected one of 'gaussian'"):
        MixtureModel(families={"items": "poison"}).fit(FRAME)
    with pytest.raises(TypeError, match="the family of column 'items' must be a name or a family, got 3"):
        MixtureModel(families={"items": 3}).fit(FRAME)  # type: ignore[dict-item]
    with pytest.raises(SchemaError, match="column 'amount' has type double, but the field"):
        MixtureModel(families={"amount": "categorical"}).fit(pa.table({"amount": [1.0, 2.0], "country": ["a", "b"]}))


def test_a_column_has_one_family() -> None:
    for families in ({("hour", "items"): Gaussian(), "items": "poisson"}, {"items": Poisson(), ("items",): Poisson()}):
        with pytest.raises(ValueError, match=r"families gives column 'items' two: .*; choose one"):
            MixtureModel(families=families).fit(FRAME)


@pytest.mark.parametrize("key", [0, (0, 1), ("items", None), ()])
def test_families_are_keyed_by_names(key: Any) -> None:
    with pytest.raises(TypeError, match=r"families has the key .*, expected the name of a column .* called 'x0'"):
        MixtureModel(families={key: "poisson"}).fit(FRAME[["hour", "items"]].to_numpy())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, CHOSEN),
        (CHOSEN, None),
        (CHOSEN, {**CHOSEN, "items": Gaussian()}),
        ({"items": Poisson()}, {"items": "gaussian"}),
        ({}, {("amount", "hour"): Gaussian("diag")}),
    ],
)
@pytest.mark.parametrize("warm_start", [False, True])
def test_families_that_changed_since_the_fit_are_refused(before: Any, after: Any, warm_start: bool) -> None:
    model = MixtureModel(2, families=before, random_state=0, warm_start=warm_start).fit(FRAME)
    density = model.score_samples(FRAME)
    model.set_params(families=after)
    np.testing.assert_array_equal(model.score_samples(FRAME), density)
    with pytest.raises(ValueError, match="set warm_start=False" if warm_start else "call fit, or set them back"):
        (model.fit if warm_start else model.partial_fit)(FRAME)
    model.set_params(families=before).partial_fit(FRAME)
    fresh = model.fork().set_params(families=after, warm_start=False).fit(FRAME)
    assert fresh.family_ == MixtureModel(2, families=after).fit(FRAME).family_


def test_a_fork_knows_the_types_of_the_columns() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME)
    for one in (model.fork(), pickle.loads(pickle.dumps(model))):
        assert one.partial_fit(FRAME).family_ == model.family_
        with pytest.raises(ValueError, match="call fit, or set them back"):
            one.set_params(families=None).partial_fit(FRAME)


def test_compiled_code_is_kept_between_calls_unless_the_pace_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_em.learners.online.COMPILE_AFTER", 1_000)
    numbers = FRAME[["amount", "hour"]]
    model = MixtureModel(2, random_state=0, batch_size=4, warm_up=40)
    for _ in range(8):
        model.partial_fit(numbers)
    kernel = model._learner._kernel
    assert kernel is not None
    assert model.partial_fit(numbers)._learner._kernel is kernel
    for change in ({"batch_size": 10}, {"step_size": 0.5}):
        reference = pickle.loads(pickle.dumps(model)).set_params(**change)
        model.set_params(**change).partial_fit(numbers)
        assert model._learner._kernel is not kernel
        kernel = model._learner._kernel
        np.testing.assert_allclose(model.weights_, reference.partial_fit(numbers).weights_, rtol=1e-9)
        assert (model._learner.batch_size, model._learner.schedule) == (10, model._schedule())


def test_samples_are_rows_of_the_frame() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME)
    table, labels = model.sample(2_000)
    assert table.column_names == list(FRAME.columns)
    assert table.schema.field("items").type == pa.int64()
    drawn = table.to_pandas()
    assert adjusted_rand_score(labels, model.predict(drawn)) > 0.95
    assert drawn["amount"].mean() == pytest.approx(FRAME["amount"].mean(), abs=0.2)
    with pytest.raises(ValueError, match="Invalid value for 'n_samples': 0"):
        model.sample(0)
    with pytest.raises(NotFittedError):
        MixtureModel().sample()


def test_shares_merge_into_the_whole() -> None:
    start = MixtureModel(2, families=CHOSEN, random_state=0, step_size="harmonic").fit(FRAME.iloc[:200])
    merged = start
    for rows in np.array_split(np.arange(200, 600), 2):
        merged = merged.merge(start.fork().partial_fit(FRAME.iloc[rows]))
    assert merged.n_samples_seen_ == 600
    whole = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME)
    assert merged.score(FRAME) > whole.score(FRAME) - 0.02


def test_warm_start_goes_on() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0, warm_start=True, tol=1e-6, max_iter=300).fit(FRAME)
    bound = model.lower_bound_
    model.fit(FRAME)
    assert model.n_iter_ <= 2
    assert model.lower_bound_ >= bound - 1e-9
    # A category that the fitted components do not know is `other` to them.
    model.fit(FRAME.assign(country="ES"))
    assert np.isfinite(model.score(FRAME))
    with pytest.raises(ValueError, match="set warm_start=False to start anew"):
        model.set_params(n_components=3).fit(FRAME)


def test_marginal_and_conditional_of_mixed_columns() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME)
    for position in (0, 7):
        event = FRAME.iloc[[position]].to_dict("records")[0]
        given = {name: event.pop(name) for name in ("country", "amount")}
        joint = model.score_samples(FRAME.iloc[[position]])
        parts = model.marginal(["country", "amount"]).log_prob(given) + model.conditional(given).log_prob(event)
        np.testing.assert_allclose(joint, parts, rtol=1e-9)
    with pytest.raises(SchemaError, match="'country' must be a string"):
        model.conditional({"country": 3.0})
    with pytest.raises(TypeError, match="given must map features to their values"):
        model.conditional(["country"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"such as \['amount'\], got 'amount'"):
        model.marginal("amount")
    with pytest.raises(ValueError, match="name at least one feature"):
        model.marginal([])


def test_description_tells_components_in_the_columns_own_terms() -> None:
    model = MixtureModel(2, families=CHOSEN, random_state=0).fit(FRAME)
    texts = [" ".join(f"{one.name} {one.text}" for one in component.fields) for component in model.describe()]
    assert sum("country 'DE'" in text for text in texts) == 1
    assert sum("country 'FR'" in text for text in texts) == 1


def test_description_leaves_out_a_category_that_a_component_never_knew() -> None:
    far = np.arange(600) % 4 == 0
    country = pd.Series(np.where(far, None, "DE"), dtype="str")
    frame = pd.DataFrame({"amount": FRAME["amount"] + 900.0 * far, "country": country})
    model = MixtureModel(2, random_state=0).fit(frame)
    named = [{field.name: field.text for field in component.fields} for component in model.describe()]
    named.sort(key=len)
    assert [set(one) for one in named] == [{"amount"}, {"amount", "country"}]
    assert named[1]["country"] == "'DE' 100%"


def test_a_name_decides_the_family_whatever_the_type_of_the_column() -> None:
    model = MixtureModel(2, families={"returned": "gaussian"}, random_state=0).fit(FRAME[["amount", "returned"]])
    assert model.family_ == Gaussian()
    flag = MixtureModel(2, families={"returned": Gaussian("diag")}, random_state=0).fit(FRAME[["amount", "returned"]])
    assert flag.family_.families["returned"] == Gaussian("diag")  # type: ignore[attr-defined]


@pytest.mark.parametrize("limit", [2, 3, 6])
def test_a_vocabulary_grows_up_to_the_limit_of_today_and_forgets_nothing(limit: int) -> None:
    old = pd.DataFrame({"c": ["a", "b", "c"] * 40})
    new = pd.DataFrame({"c": ["d", "e", "f", "g"] * 40})
    model = MixtureModel(1, max_categories=3, random_state=0).fit(old)
    model.set_params(max_categories=limit).partial_fit(new)
    categories = model._learner._known_schema().fields[0].categories
    assert categories == tuple("abcdef")[: max(3, limit)]
