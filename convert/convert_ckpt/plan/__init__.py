"""Pure decisions: what each tensor becomes, before any byte of it is read."""
