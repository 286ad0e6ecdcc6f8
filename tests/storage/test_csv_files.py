"""CSV files come back text for text, and a broken one is refused by its file and row."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soteria.errors import UserError
from soteria.storage.csv_files import CsvFile, read_table, write_table

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(',;\t"\r\n 1N'), max_size=9)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_table_of_any_texts_is_read_back_text_for_text(tmp_path_factory, rows):
    path, table = tmp_path_factory.getbasetemp() / "any.csv", pd.DataFrame(rows, columns=["A", "NA"], dtype=object)
    write_table(table, path)
    assert read_table(path).to_dict("list") == table.to_dict("list")
    assert path.read_bytes().startswith(b'"A","NA"\n') == any("\r" in text for row in rows for text in row)


def test_the_delimiter_is_the_one_that_gives_a_wanted_column(tmp_path):
    for delimiter in ",;\t":
        (tmp_path / "a.csv").write_text(f"\ufeffid{delimiter}question\n\n0{delimiter}hot\n")
        found = CsvFile.open(tmp_path / "a.csv", ["question"])
        assert (found.columns, list(found.rows())) == (["id", "question"], [["0", "hot"]])
    assert CsvFile.open(tmp_path / "a.csv", ["other"]).delimiter == ","


BROKEN = {  # content: what the error names
    b"": "empty",
    b"a,a\n1,2\n": "'a'",
    b"\xe5,b\n1,2\n": "UTF-8",
    b"a,b\n1,2\n\n1,2,3\n": r"row 1 \(line 4\) has 3 fields",
    b"a,b\n1,2\n1\n": "row 1 ",
    b'a,b\n1,"2\n': r"row 0 \(up to line 2\)",
    b'a,b\n1,"2" 3\n': "row 0 ",
    b"a,b\n1,2\n\xfc,2\n": r"row 1 \(line 3\) .* UTF-8",
}


def test_a_broken_file_is_refused_by_name_and_row(tmp_path):
    for content, named in BROKEN.items():
        (tmp_path / "broken.csv").write_bytes(content)
        with pytest.raises(UserError, match=rf"broken\.csv.*{named}"):
            read_table(tmp_path / "broken.csv")
    pd.DataFrame({"question": ["Why?"]}).to_parquet(tmp_path / "broken.csv")
    with pytest.raises(UserError, match=r"broken\.csv is not a text file; save it as CSV"):
        read_table(tmp_path / "broken.csv")
    for place in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(UserError, match=place.name):
            read_table(place)
