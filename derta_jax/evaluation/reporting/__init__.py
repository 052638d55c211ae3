"""The parts of a report: rates, sentences, comparisons, figures, and the page that holds them."""
