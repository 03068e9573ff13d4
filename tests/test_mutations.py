"""The script that breaks the code fits the code, and its page is of this list."""

import pytest

from tests.mutations import MUTATIONS, ROOT, TABLE, Mutation, run


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_to_change_is_there_once_and_the_tests_exist(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert (ROOT / mutation.tests[0]).is_file()


def test_the_page_has_every_mutation_and_no_other() -> None:
    rows = TABLE.read_text(encoding="utf-8").splitlines()
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows if " | `" in row]
    assert names == [mutation.name for mutation in MUTATIONS]


def test_a_mistake_is_noticed_and_its_absence_is_not() -> None:
    """The shortest of them, and the same place changed into what says the same."""
    noticed = next(m for m in MUTATIONS if m.name == "blocks never leave the window")
    assert run(noticed).failed_test is not None
    harmless = Mutation(
        name="nothing",
        file=noticed.file,
        old=noticed.old,
        new=f"            assert True\n{noticed.old}",
        tests=("tests/models/test_scoring.py",),
    )
    assert run(harmless).failed_test is None
