"""What is shown of the comparison."""

from flwr.app import UserConfig

COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "evaluate/client-server-barrier": "barrier",
    "bytes/up": "up a round",
}
PERSONALIZED = {
    "central/accuracy-same": "same clients",
    "central/finetuned-accuracy-same": "fine-tuned",
    "central/accuracy-shifted": "held out",
    "central/finetuned-accuracy-shifted": "fine-tuned",
}
PANELS = ["central/loss", "central/accuracy", "evaluate/client-server-barrier"]


def columns(config: UserConfig) -> dict[str, str]:
    """Return the columns of the table."""
    return {**COLUMNS, **(PERSONALIZED if int(config["finetune-steps"]) else {})}
