"""
Three short scenes in Shakespeare's manner, from the run that was trained last.

$ python sample.py sample_shakespeare
$ python sample.py sample_shakespeare "JULIET:" --out_dir=out/my_run
"""

start = 'ROMEO:'  # a speaker's name as the plays print it; what follows is the speech
num_samples = 3
max_new_tokens = 500  # about 90 words from a character model, 375 from a BPE one

# At temperature 1 a small model errs in a letter every few words, and much below 0.7 it repeats
# itself. At 0.8 a token a tenth as likely as the best counts 0.1^(1/0.8) = 0.056 instead of 0.1.
temperature = 0.8
min_p = 0.02  # nothing 50 times less likely than the best: misspellings begin with such tokens
top_k = None  # min_p does its work, and looks at how sure the model is
repetition_penalty = 1.0  # words are spelt from 65 characters: all of them have to come again
