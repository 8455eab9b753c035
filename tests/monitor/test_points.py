"""Points and curves are read whatever their order, and every mistake in a file is told with its place."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.errors import WrongInput
from monitor.forecast.columns import scale_of
from monitor.forecast.points import is_curves, points_of, read_curves, read_points
from monitor.forecast.table import Table, read_table

LN2 = math.log(2)
GOOD = "run,params,tokens,loss\na,1e6,2e7,4.0\nb,2e6,4e7,3.7\n"


def write(folder: Path, text: str | bytes, name: str = "points.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        "loss,tokens,run,params\n4.0,2e7,a,1e6\n3.7,4e7,b,2e6\n",
        "LOSS,D,Model,N\n4.0,2e7,a,1e6\n3.7,4e7,b,2e6\n",
        "run,Model Size (M),Tokens (M),loss\na,1,20,4.0\nb,2,40,3.7\n",
        "run,params,tokens,loss\na,1e6,2e7,4.0\n\nb,2e6,4e7,3.7\n\n",
        "name,num_parameters,total_tokens,eval/loss\na,1e6,2e7,4.0\nb,2e6,4e7,3.7\n",
        "Name,Params (millions),Tokens (Million),train/loss,val/loss\na,1,20,3.9,4.0\nb,2,40,3.6,3.7\n",
        "model,params_m,tokens_in_millions,loss (nats)\na,1,20,4.0\nb,2,40,3.7\n",
        f"model,params in millions,tokens [10^6],loss_bits\na,1,20,{4.0 / LN2}\nb,2,40,{3.7 / LN2}\n",
        f"id,N (M params),D (millions of tokens),bits per token\na,1,20,{4.0 / LN2}\nb,2,40,{3.7 / LN2}\n",
        "# my runs, all of them\n" + GOOD,
        "# " + GOOD,
        GOOD.replace(",", "|"),
        "run,params,tokens,loss\na,1e6,2e7,4.0,\nb,2e6,4e7,3.7,\n",
    ],
)
def test_the_same_runs_are_read_from_every_usual_spelling(tmp_path: Path, text: str) -> None:
    points = read_points(write(tmp_path, text))
    assert points.run == ("a", "b")
    np.testing.assert_allclose(points.params, [1e6, 2e6])
    np.testing.assert_allclose(points.tokens, [2e7, 4e7])
    np.testing.assert_allclose(points.loss, [4.0, 3.7])
    np.testing.assert_allclose(points.flops, 6 * points.params * points.tokens)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ":1:1: the file is empty"),
        ("   \n\n", ":1:1: the file is empty"),
        ("run,params,tokens,loss\n", ":2:1: no rows"),
        ("run,params,loss\na,1,2\n", "no column 'tokens'"),
        ("run,params,tokens\na,1,2\n", "no column 'loss'"),
        ("run,params,tokens,ppl\na,1,2,9\n", "natural logarithm"),
        ("run,params,tokens,bpb\na,1,2,1\n", "--columns loss=bpb"),
        ("7,1e6,2e7,4.0\n8,2e6,4e7,3.7\n", "is the header line missing"),
        ("run,params,tokens,loss\na,1e6,2e7,-3\n", ":2:11 loss: '-3' is out of range"),
        ("run,params,tokens,loss\na,0,2e7,3\n", ":2:3 params: '0' is out of range"),
        ("run,params,tokens,loss\na,1e6,lots,3\n", ":2:7 tokens: 'lots' is no number"),
        ("run,params,tokens,loss\na,1e6,1_000,3\n", "underscores"),
        ('run,params,tokens,loss\na,1e6,"2,000",3\n', "a point for decimals"),
        ("run,params,tokens,loss\na,1e6,,3\n", "tokens: '' is empty"),
        ("run,params,tokens,loss\na,1e6,2e7\n", ":2:1: 3 values under 4 columns"),
        ("run,params,params,loss\na,1,2,3\n", "the column 'params' is there twice"),
        ("run,step,loss\na,1,2\n", "holds curves"),
        (b"run,params\xff,tokens,loss\n", ":1: not UTF-8"),
        (b"run,params,tokens,loss\na,\x00,2,3\n", ":2: holds a zero byte"),
        ("run params tokens loss\na 1 2 3\n", "told apart by commas"),
        ('[{"run": "a", "params": 1, "tokens": 2, "loss": 3}]', ":1:1: is JSON; give CSV"),
        ("# nothing\n# else\n", "nothing but comments"),
        (b"PK\x03\x04....", "spreadsheets are; save it as CSV"),
        (b"\x1f\x8b....", "gzip; unpack it"),
        (GOOD.encode("utf-16"), "UTF-16"),
        (b"PAR1 but not really", "damaged Parquet"),
    ],
)
def test_a_broken_file_is_told_with_its_place(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(WrongInput) as error:
        read_points(write(tmp_path, text))
    assert says in str(error.value)
    assert "points.csv" in str(error.value)


def test_a_missing_file_and_a_folder_are_wrong_input(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(WrongInput):
            read_points(path)


def test_many_mistakes_are_counted_not_all_printed(tmp_path: Path) -> None:
    rows = "".join(f"r{i},x,1,2\n" for i in range(40))
    with pytest.raises(WrongInput, match="and 34 more"):
        read_points(write(tmp_path, "run,params,tokens,loss\n" + rows))


def test_of_a_cell_that_is_a_page_long_the_beginning_is_shown(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"params,tokens,loss\n{'[' * 100_000},1,2\n")
    with pytest.raises(WrongInput) as caught:
        read_points(tmp_path / "p.csv")
    assert "2:1 params: '[[" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("loss", ["", "nan", "NaN", "inf", "-inf"])
def test_a_point_without_a_finite_loss_is_left_out_with_its_line(tmp_path: Path, loss: str) -> None:
    points = read_points(write(tmp_path, GOOD + f"c,3e6,6e7,{loss}\n"))
    assert points.run == ("a", "b")
    assert [(e.run, e.reason) for e in points.excluded] == [("c", "line 4: the loss is empty or not finite")]


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.table({"loss": [4.0, None], "run": ["a", "b"], "params": [10**6, 2], "tokens": [2e7, 3.0]}),
        tmp_path / "p",
    )
    points = read_points(tmp_path / "p")
    assert points.run == ("a",) and points.excluded[0].run == "b"


def test_where_and_columns_pick_rows_and_names(tmp_path: Path) -> None:
    path = write(tmp_path, "name,width,size,seen,val,kind\na,1,1e6,2e7,4,x\nb,1,2e6,4e7,3,y\n")
    points = read_points(path, {"params": "size", "tokens": "seen", "loss": "val"}, {"kind": "y"})
    assert points.run == ("b",) and points.params[0] == 2e6
    with pytest.raises(WrongInput, match="there are x, y"):
        read_points(path, {"params": "size", "tokens": "seen", "loss": "val"}, {"kind": "z"})


@given(st.permutations(range(6)))
def test_a_curve_does_not_depend_on_the_order_of_its_rows(order: list[int]) -> None:
    steps = [0, 5, 10, 15, 20, 25]
    table = {
        "run": ["a"] * 6,
        "step": [str(steps[i]) for i in order],
        "loss": [str(9.0 - steps[i] / 10) for i in order],
    }
    from monitor.forecast import points as module

    found = module.curves_of_table(
        Table("c.csv", {k: list(v) for k, v in table.items()}, list(range(2, 8))), "c"
    )
    assert found.runs[0].step.tolist() == steps
    np.testing.assert_allclose(found.runs[0].loss, [9.0 - s / 10 for s in steps])


def test_a_row_whose_loss_is_empty_is_none_of_its_curve(tmp_path: Path) -> None:
    curves = read_curves(write(tmp_path, "run,step,loss\na,0,5\na,1,\na,2,4\nb,0, \nc,1,nan\n"))
    assert [(c.run, c.step.tolist(), c.without_loss) for c in curves.runs] == [
        ("a", [0, 2], 1),
        ("c", [1], 0),
    ]
    assert curves.without_loss == 2


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_non_finite_loss_stays_in_its_curve(tmp_path: Path, loss: str) -> None:
    curves = read_curves(write(tmp_path, f"run,step,loss\na,0,5\na,1,{loss}\na,2,4\n"))
    assert len(curves["a"]) == 3 and not np.isfinite(curves["a"].loss[1])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run,step,loss\na,1.5,3\n", "no whole number"),
        ("run,step,loss\na,-1,3\n", "out of range"),
        ("run,step,loss,params\na,1,3,10\na,2,3,20\n", "2 values of params"),
        ("run,step\na,1\n", "no column 'loss'"),
        ("run,step,loss,lr\na,1,3,-0.1\na,2,3,0.1\n", "lr: -0.1 is out of range"),
    ],
)
def test_a_broken_curve_is_told_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(WrongInput, match=says):
        read_curves(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "kept", "attempts"),
    [
        ("attempt,step,loss\n0,1,5\n0,2,4\n0,3,9\n1,3,3\n1,4,2\n", [5, 4, 3, 2], [1, 1, 1, 2, 2]),
        ("step,loss\n1,5\n2,4\n3,9\n2,4.1\n3,3\n4,2\n", [5, 4.1, 3, 2], [1, 1, 1, 2, 2, 2]),
        ("step,loss\n1,5\n2,4\n4,2\n3,3\n5,1\n", [5, 4, 3, 2, 1], None),
        ("step,loss\n1,5\n2,4\n3,3\n1,5\n2,4\n3,3\n", [5, 5, 4, 4, 3, 3], None),
    ],
    ids=["by its column", "steps that come again", "a row that is late", "rows that are there twice"],
)
def test_a_resumed_run_is_what_its_newest_attempt_says(
    tmp_path: Path, text: str, kept: list[float], attempts: list[int] | None
) -> None:
    path = write(tmp_path, text)
    assert read_curves(path).runs[0].loss.tolist() == kept
    every = read_curves(path, attempts=True).runs[0].attempt
    assert (None if every is None else every.tolist()) == attempts


def test_rows_of_a_validation_alone_are_no_losses_that_were_not_finite(tmp_path: Path) -> None:
    text = "step,loss,val_loss\n1,5,\n2,4,\n2,,4.5\n3,3,\n4,,3.5\n5,nan,\n6,2,2.5\n"
    run = read_curves(write(tmp_path, text)).runs[0]
    assert run.step.tolist() == [1, 2, 3, 5, 6] and np.isnan(run.loss).tolist() == [0, 0, 0, 1, 0]
    assert run.val_loss is not None
    assert run.val_loss[[1, 2, 4]].tolist() == [4.5, 3.5, 2.5] and np.isnan(run.val_loss[[0, 3]]).all()
    alone = read_curves(write(tmp_path, "step,loss,val_loss\n1,,5\n2,,4\n")).runs[0]
    assert alone.loss.tolist() == [5, 4]


def test_step_and_tokens_may_start_at_zero_and_batches_make_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, "run,step,loss\na,0,5\na,10,4\n")
    assert is_curves(path)
    assert read_curves(path)["a"].tokens is None
    tokens = read_curves(path, batch_tokens=512)["a"].tokens
    assert tokens is not None and tokens.tolist() == [0, 5120]


@pytest.mark.parametrize(
    ("name", "plain", "scale"),
    [
        ("Model Size (B)", "model_size", 1e9),
        ("FLOPs (1E21)", "flops", 1e21),
        ("loss (nats)", "loss", 1.0),
        ("loss (smooth)", "loss_(smooth)", 1.0),
        ("params (active)", "params_(active)", 1.0),
        ("Tokens (billions of tokens)", "tokens", 1e9),
        ("tokens_b", "tokens", 1e9),
        ("FLOPs (10^21)", "flops", 1e21),
        ("loss_bits", "loss", LN2),
        ("grad_b", "grad_b", 1.0),
        ("width_m", "width_m", 1.0),
        ("N", "n", 1.0),
    ],
)
def test_a_unit_in_brackets_scales_and_other_brackets_stay(name: str, plain: str, scale: float) -> None:
    assert scale_of(name) == (plain, scale)


def test_an_extra_column_is_kept_as_it_stands(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "run,params,tokens,loss,lr\na,1,2,3,0.1\n"))
    assert points_of(table).extra == {"lr": ["0.1"]}


def test_sizes_beyond_numbers_are_left_out_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    points = read_points(write(tmp_path, GOOD + "c,1e200,1e200,3.0\nd,1e-200,1e-200,3.0\n"))
    assert points.run == ("a", "b") and not recwarn.list
    assert all("no finite number" in e.reason for e in points.excluded) and len(points.excluded) == 2
