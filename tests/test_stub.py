"""The stub of the torch-style classes."""

import stub


def test_the_stub_has_the_signatures_of_the_classes():
    assert stub.PATH.read_text() == stub.stub(), "run `make stub`"
