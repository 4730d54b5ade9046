"""
How positive a film review is: the logit of a classifier of the Hub, or of the folder in the
environment variable SENTIMENT_MODEL.

$ python train.py rl_sentiment
"""

import functools
import os

import torch

MODEL = 'lvwerra/distilbert-imdb'


@functools.cache
def classifier():
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = os.environ.get('SENTIMENT_MODEL', MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    return model.eval(), AutoTokenizer.from_pretrained(name)


@torch.no_grad()
def reward(prompts, completions, rows):
    model, tokenizer = classifier()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors='pt')
    return model(**inputs).logits[:, 1].tolist()  # of the label "positive"
