"""One file per kind of question: what is asked, what counts as right, what is reported."""
