# The loss of OpenAI's GPT-2 350M on OpenWebText. The weights are downloaded from the Hugging Face
# Hub; --init_from=FOLDER reads them from a folder.
# $ python train.py eval_gpt2_medium

init_from = 'gpt2-medium'
# nanoGPT reports 2.85 on the training split and 2.84 on the validation split
dataset = 'openwebtext'
eval_only = True
batch_size = 4
eval_iters = 500  # 500 * 4 sequences * 1,024 tokens = 2 million of each split
