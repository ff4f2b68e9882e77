"""Going out to the Hub and back: publish, pull, what its widget will do, streaming that waits."""
