"""A sample of campaign.py, which tries many more: bad inputs are refused in one line and leave everything as it was."""
from campaign import campaign, cases, fixtures_in

SAMPLE = """
edit: good
edit: --steps 'nan'
edit: --model is lm
edit: --input endless
edit: output in a closed folder
edit: photo.png PNG cut in half
edit: golden unet/diffusion_pytorch_model.safetensors cut
edit: golden vae/config.json list
edit: unet/config.json cross_attention_dim -1
train: --weights no=1
train: --data is photo.png
train: data metadata.jsonl []
train-on-a-tar: shard.tar cut in a file
instructions: lines.jsonl null
pairs: --resolution 33
pretrain: --parts text2image
evaluate: --scales 1:
claims: --seeds 1 1
magicbrush: magicbrush edit_sessions.json list
curve: ip2p seeds.json null
page: --outputs ../../fixtures/ours
tally: --key missing
benchmark: --save x
""".strip().splitlines()


def test_a_sample_of_the_campaign(tmp_path):
    chosen = [case for case in cases() if case.name in SAMPLE]
    assert len(chosen) == len(SAMPLE)
    assert not campaign(tmp_path, chosen, parts=[fixtures_in])
