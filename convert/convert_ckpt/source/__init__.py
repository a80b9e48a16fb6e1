"""What SOURCE is, on this machine or elsewhere, and how its bytes come here."""
