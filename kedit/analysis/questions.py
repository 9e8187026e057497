"""The questions of the study."""

QUESTIONS = {
    "rq1": "rq1_number_of_edits",
    "rq2": "rq2_instruction_tuning",
    "rq3": "rq3_model_scale",
    "rq4": "rq4_ability_aspects",
    "rq5": "rq5_safety",
    "discussion": "structure_damage",
}
"""Folder of parameters and figures -> the question's notebook."""
