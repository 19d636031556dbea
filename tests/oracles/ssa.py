"SSA-Seg's classifier (ssa_classifier.md, section 2): coarse logits, adapted prototypes, scaled cosine."

import torch
import torch.nn.functional as F

HEAD = "decode_head."


def ssa_keys(k, c, head=HEAD):
    "What the classifier adds to a head of `c` channels that has `conv_seg` already."
    keys = {head + "get_feat_pos.weight": (c, 1, 3, 3), head + "get_feat_pos.bias": (c,)}
    keys[head + "center_pos.weight"] = (k, c)
    for name in ("center_content_proj", "center_pos_proj"):
        for who in ("", "gt_"):
            keys[f"{head}{who}{name}.0.weight"] = (c // 2, 2 * c)
            keys[f"{head}{who}{name}.2.weight"] = (c, c // 2)
            keys[f"{head}{who}{name}.2.bias"] = (c,)
    for who in ("", "gt_"):
        keys[f"{head}{who}center_proj.weight"] = (c, c)
    keys[head + "ssa_loss.criterion.empty_weight"] = (k + 1,)
    return keys


def unit_length(x, dim):
    return x / (x.norm(dim=dim, keepdim=True) + 1e-12)


def ssa_answer(net, feat, head=HEAD):
    "`net` is a `Plain`, `feat` the map in front of `conv_seg`: coarse and final logits, both kinds of prototypes."

    def mlp(x, at):
        return net.linear(F.relu(net.linear(x, f"{head}{at}.0")), f"{head}{at}.2")

    prototypes = net.s[head + "conv_seg.weight"][:, :, 0, 0]
    basis = net.s[head + "center_pos.weight"]
    position = net.conv(feat, head + "get_feat_pos")
    coarse = net.conv(feat, head + "conv_seg")
    flat = coarse.flatten(2)
    share = flat.softmax(1)  # of the classes at a pixel
    semantic = share @ feat.flatten(2).transpose(1, 2) / (share.sum(2, keepdim=True) + 1e-12)
    semantic = mlp(torch.cat([semantic, prototypes.expand_as(semantic)], 2), "center_content_proj")
    # of the pixels of a class
    spatial = flat.softmax(2) @ position.flatten(2).transpose(1, 2)
    spatial = mlp(torch.cat([basis.expand_as(spatial), spatial], 2), "center_pos_proj")
    z = net.linear(semantic + spatial, head + "center_proj")
    cosine = unit_length(z, 2) @ unit_length(feat + position, 1).flatten(2)
    logits = 15 * cosine.unflatten(2, feat.shape[2:])
    return {"logits": logits, "coarse": coarse, "semantic": semantic, "spatial": spatial}
