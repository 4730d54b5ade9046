# The loss of OpenAI's GPT-2 124M on OpenWebText. The weights are downloaded from the Hugging Face
# Hub; --init_from=FOLDER reads them from a folder.
# $ python train.py eval_gpt2

init_from = 'gpt2'
# nanoGPT reports 3.11 on the training split and 3.12 on the validation split
dataset = 'openwebtext'
eval_only = True
batch_size = 8
eval_iters = 500  # 500 * 8 sequences * 1,024 tokens = 4.1 million of each split
