"""What exported models are asked in the tests of this folder."""

PROMPTS = [[7, 1, 90, 3], [5], list(range(3, 50))]
NEW_TOKENS = 10
