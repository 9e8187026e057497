"""The pages that people read: short enough, no dead link, and no number that the committed results do not say."""

import json
import re

import pytest

import kedit
from kedit import KeditError
from kedit.analysis import claims, readme

PAGES = [*readme.PAGES, "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    path = kedit.ROOT / page
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert links
    assert not [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]


def test_the_readme_is_short_and_leads_to_every_page():
    text = (kedit.ROOT / "README.md").read_text()
    assert len(text.split()) < 1500
    assert all(f"({page})" in text for page in PAGES if page != "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decision", "answers", "claims"])
def test_pages_say_what_the_committed_results_say(name):
    table = readme.TABLES[name]()
    pages = [(kedit.ROOT / page).read_text() for page in readme.PAGES]
    pages = [text for text in pages if f"<!-- table {name} -->" in text]
    assert pages
    assert all(readme.filled(name, text, table) == text for text in pages), f"python -m kedit tables {name}"


@pytest.mark.slow
def test_every_claim_has_a_command_minutes_a_file_and_intervals():
    table = claims.claims()
    heads = table[table.claim.str.startswith("**")]
    assert set(heads.claim.str[2:].str.split(":").str[0].str.lower()) == {
        "rq1",
        "rq2",
        "rq3",
        "rq4",
        "rq5",
        "discussion",
    }
    assert heads.command.str.match(r"`make \w+( PARAMS=\S+)?`$").all()
    assert heads.minutes.astype(int).gt(0).all()
    files = heads.file.str.extract(r"\((.+)\)$")[0]
    assert all((kedit.ROOT / file).is_file() for file in files)
    assert (
        table.measured[~table.claim.str.startswith("**")].str.contains(r"-?\d\.\d\d \[-?\d+\.\d\d, -?\d+\.\d\d\]").all()
    )


def test_a_table_without_a_place_is_refused(monkeypatch):
    monkeypatch.setitem(readme.TABLES, "nowhere", str)
    with pytest.raises(KeditError, match="no page has a place for the table 'nowhere'"):
        readme.update_readme(["nowhere"])


@pytest.mark.parametrize("path", sorted((kedit.ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_figure_of_a_notebook_says_in_words_what_it_shows(path):
    notebook = json.loads(path.read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    for figure in figures:
        said = "".join(figure["data"]["text/plain"])
        assert figure["metadata"]["image/png"]["alt"] == said
        assert len(said) > 40
        assert not said.startswith("<Figure")
    assert notebook["metadata"]["language_info"] == {"name": "python"}
