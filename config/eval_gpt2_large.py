# The loss of OpenAI's GPT-2 774M on OpenWebText. The weights are downloaded from the Hugging Face
# Hub; --init_from=FOLDER reads them from a folder.
# $ python train.py eval_gpt2_large

init_from = 'gpt2-large'
# nanoGPT reports 2.66 on the training split and 2.67 on the validation split
dataset = 'openwebtext'
eval_only = True
batch_size = 4
eval_iters = 500  # 500 * 4 sequences * 1,024 tokens = 2 million of each split
