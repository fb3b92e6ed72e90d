"""FLASC and the methods it is compared with, on mailing lists by sender."""
