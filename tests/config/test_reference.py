"""The recipe reference holds every setting of the schema, and a stale document fails the check."""

from pathlib import Path

import pytest

from gendistill.config.explain import settings
from gendistill.config.reference import fill_document, main, render_reference, type_words, walk_sections
from gendistill.config.schema import Recipe
from gendistill.errors import OutputError

ROOT = Path(__file__).parents[2]


def test_every_section_of_the_schema_is_reached():
    paths = [".".join(map(str, path)) for path, _ in walk_sections()]
    assert paths[0] == ""
    for path in ("teacher", "student.mixers", "data.NAME", "heldout", "stages.NAME.schedule", "eval"):
        assert path in paths
    assert paths.count("data.NAME") == 2
    assert paths.count("stages.NAME.objective") >= 6
    assert len({section for _, section in walk_sections()}) == len(paths)


def test_every_setting_has_a_row():
    rendered = render_reference()
    for _, section in walk_sections():
        for name in settings(section):
            assert f"| `{name}` |" in rendered


def test_every_setting_but_those_of_mixers_and_eval_says_what_it_means():
    for path, section in walk_sections():
        for name, field in settings(section).items():
            has_own_table = any(other[: len(path) + 1] == (*path, name) for other, _ in walk_sections())
            if path[:2] != ("student", "mixers") and path != ("eval",) and name != "kind":
                assert has_own_table or field.description, (path, name)


def test_types_are_named_in_words():
    fields = settings(Recipe)
    assert type_words([fields["seed"].annotation]) == "whole number"
    assert type_words([tuple[float, float]]) == "list of numbers"
    assert type_words([str, tuple[str, ...], type(None)]) == "text | list of text | null"


def test_the_document_is_up_to_date():
    assert main([str(ROOT / "docs" / "recipes.md"), "--check"]) == 0


def test_a_stale_document_fails_the_check_and_is_filled(tmp_path, capsys):
    page = tmp_path / "recipes.md"
    page.write_text("before\n<!-- settings -->\nold\n<!-- /settings -->\nafter\n")
    assert main([str(page), "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert main([str(page)]) == 0
    assert main([str(page), "--check"]) == 0
    assert page.read_text().startswith("before\n<!-- settings -->\n\n### Top level")
    assert page.read_text().endswith("<!-- /settings -->\nafter\n")


def test_a_document_without_a_block_is_refused():
    with pytest.raises(OutputError, match="exactly one settings block"):
        fill_document("nothing")
