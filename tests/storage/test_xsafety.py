"""XSafety's headless files, a category each, as one question file a language."""

from soteria.answering.questions import read_questions
from soteria.languages import find_language
from soteria.storage.xsafety import JOINED, SOURCE, join_categories


def test_a_languages_categories_become_one_file_that_questions_are_read_from(tmp_path):
    files = {
        "en/Insult_n.csv": "One, two?\nThree?\n",
        "en/Mental_Health_en.csv": '"Said ""no"", then?"\n\n',
        "sp/Insult.csv": "\ufeff¿Uno?\n",
        "ja/Insult.csv": "一？\n",  # not one of the paper's languages
    }
    for name, text in files.items():
        path = tmp_path / SOURCE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert [path.name for path in join_categories(tmp_path)] == ["English.csv", "Spanish.csv"]
    english = read_questions(str(tmp_path / JOINED / "English.csv"), find_language("en"))
    assert english.questions == ["One, two?", "Three?", 'Said "no", then?']
    assert english.categories == ["Insult", "Insult", "Mental_Health"]
    spanish = read_questions(str(tmp_path / JOINED / "Spanish.csv"), find_language("es"))
    assert spanish.questions == ["¿Uno?"]


def test_without_the_repository_nothing_is_written(tmp_path):
    assert join_categories(tmp_path) == [] and not list(tmp_path.iterdir())
