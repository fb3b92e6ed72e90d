"""What to train of a public encoder, where every mail is to be private."""
