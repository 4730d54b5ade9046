"""
Three short scenes in the style of Shakespeare, from the newest run.

$ python sample.py sample_shakespeare
$ python sample.py sample_shakespeare "JULIET:" --out_dir=out/my_run
"""

start = 'ROMEO:'  # a speaker's name as printed in the plays; the model writes the speech
num_samples = 3
max_new_tokens = 500  # about 90 words from a character model, 375 with BPE

# At temperature 1 a small model misspells a word every few words; much below 0.7 it repeats itself.
# At 0.8, a token a tenth as likely as the best one counts 0.1^(1/0.8) = 0.056 instead of 0.1.
temperature = 0.8
min_p = 0.02  # excludes tokens 50 times less likely than the best, which start misspellings
top_k = None  # min_p replaces it, and adapts to how confident the model is
repetition_penalty = 1.0  # off: a text made of 65 characters must repeat them
