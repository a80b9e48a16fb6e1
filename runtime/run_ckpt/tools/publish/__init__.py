"""A conversion's result shown to others: model card, report, and the upload to the Hub."""
