"""`--data CORPUS`: the course's files with a few of the built-in corpus' rows, of which a run is prepared and predicted
in a moment: 200 to train on, 60 dev and 20 test rows of each task."""

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
