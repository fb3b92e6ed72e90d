"""Questions on documents of providers: few clients a round, few bytes."""
