"""Scores printed in the report (tables 7 and 8, instruct models), for checks against its text."""

INSTRUCT_14B = {
    "MMLU-Pro": 63.7, "MMLU-redux": 80.0, "LiveBench 0831": 44.4, "GPQA": 45.5, "MATH": 80.0,
    "GSM8K": 94.8, "HumanEval": 83.5, "MBPP": 82.0, "MultiPL-E": 72.8, "LiveCodeBench": 42.6,
    "IFEval": 81.0, "Arena-Hard": 68.3, "MT-Bench": 8.88,
}  # fmt: skip
INSTRUCT_TURBO = {
    "MMLU-Pro": 64.5, "MMLU-redux": 81.7, "LiveBench 0831": 42.3, "GPQA": 42.3, "MATH": 81.1,
    "GSM8K": 93.8, "HumanEval": 86.6, "MBPP": 82.8, "MultiPL-E": 73.7, "LiveCodeBench": 37.8,
    "IFEval": 76.3, "Arena-Hard": 67.1, "MT-Bench": 8.81,
}  # fmt: skip
