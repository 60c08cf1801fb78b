"""The toy world: small scenes of coloured shapes, with captions, edit instructions and the TRUE edited image.

A scene is a description; `render` turns descriptions into pixels.  Because an edit changes the description, the
edited image, the mask of the edit and the edited caption are exact: the truth that no real data set has.
"""
import random
from dataclasses import dataclass, replace

import torch

SIZE = 32                                                     # pixels, width and height
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (214, 40, 40), "green": (46, 150, 60), "blue": (40, 80, 200),
           "yellow": (245, 210, 40), "purple": (140, 50, 170), "orange": (245, 130, 30)}
BACKGROUNDS = {"white": (238, 238, 238), "black": (28, 28, 28), "gray": (128, 128, 128),
               "pink": (245, 170, 195), "teal": (60, 165, 165), "brown": (115, 75, 45)}
RGB = COLOURS | BACKGROUNDS
KINDS = ("colour", "background", "shape", "remove", "add")    # of edits
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Object:
    """A shape with its centre (x, y) and radius in pixels; colour is a name or an RGB triple 0-255."""
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self):
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background, whose brightness changes by `shade` (a vector) from edge to edge, and up to three objects."""
    background: str
    shade: tuple
    objects: tuple

    @property
    def caption(self):
        names = [f"{article(o.name)} {o.name}" for o in self.objects]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
        return f"{listed} on a {self.background} background" if names else f"a {self.background} background"

    @property
    def held_out(self):
        """Whether an object shows one of the combinations (colour, shape, background) that training never sees: one in six."""
        where = list(BACKGROUNDS).index(self.background)
        return any((list(COLOURS).index(o.colour) + SHAPES.index(o.shape) + where) % 6 == 0 for o in self.objects)


@dataclass(frozen=True)
class Edit:
    """One sample of the paper's table 1, as descriptions: I_input and the true I_edit are `render` of the scenes."""
    kind: str
    scene: Scene
    edited: Scene
    instruction: str                                          # C_f
    reverse_instruction: str                                  # C_r
    subject: str                                              # the colour that an entangled pair lets leak


def article(words):
    return "an" if words[0] in "aeiou" else "a"


def place(rng, others):
    """(x, y, radius) of a new object that touches none of the others, or None when thirty throws found no room."""
    for _ in range(30):
        radius = rng.uniform(4.5, 7.5)
        x, y = (rng.uniform(radius + 1, SIZE - radius - 1) for _ in "xy")
        if is_free(x, y, radius, others):
            return x, y, radius
    return None


def is_free(x, y, radius, others):
    return all((x - o.x) ** 2 + (y - o.y) ** 2 > (radius + o.radius + 1.5) ** 2 for o in others)


def random_scene(rng):
    scene = Scene(rng.choice(list(BACKGROUNDS)), (rng.uniform(-.12, .12), rng.uniform(-.12, .12)), ())
    names = rng.sample([(c, s) for c in COLOURS for s in SHAPES], rng.choice((1, 2, 2, 3)))
    for name in names:                                        # no two objects have one name: "the red circle" is unique
        if spot := place(rng, scene.objects):
            scene = replace(scene, objects=scene.objects + (Object(*name, *spot),))
    return scene


def random_edit(rng, scene, kind):
    """One edit of the kind, or None where the scene has no room for it."""
    if kind == "background":
        new = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        return Edit(kind, scene, replace(scene, background=new), f"make the background {new}",
                    f"make the background {scene.background}", new)
    if kind == "add":
        free = [(c, s) for c in COLOURS for s in SHAPES if f"{c} {s}" not in [o.name for o in scene.objects]]
        spot = place(rng, scene.objects) if len(scene.objects) < 3 else None
        if spot is None:
            return None
        new = Object(*rng.choice(free), *spot)
        return Edit(kind, scene, replace(scene, objects=scene.objects + (new,)),
                    f"add {article(new.name)} {new.name}", f"remove the {new.name}", new.colour)
    old = rng.choice(scene.objects)
    if kind == "remove":
        rest = tuple(o for o in scene.objects if o is not old)
        return Edit(kind, scene, replace(scene, objects=rest), f"remove the {old.name}",
                    f"add {article(old.name)} {old.name}", old.colour)
    if kind == "colour":
        new = replace(old, colour=rng.choice([c for c in COLOURS if c != old.colour]))
        texts = f"make the {old.name} {new.colour}", f"make the {new.name} {old.colour}"
    else:
        new = replace(old, shape=rng.choice([s for s in SHAPES if s != old.shape]))
        texts = f"turn the {old.name} into a {new.shape}", f"turn the {new.name} into a {old.shape}"
    if new.name in [o.name for o in scene.objects]:
        return None
    changed = tuple(new if o is old else o for o in scene.objects)
    return Edit(kind, scene, replace(scene, objects=changed), *texts, new.colour)


def edit(split, index, seed=0):
    """Sample `index` of a split: a pure function of its arguments.  The kinds take turns.  Training and validation
    never show a held-out combination, in the input or the edited scene; in every test sample at least one does."""
    rng = random.Random(f"{seed} {split} {index}")
    while True:
        made = random_edit(rng, random_scene(rng), KINDS[index % len(KINDS)])
        if made and (made.scene.held_out or made.edited.held_out) == (split == "test"):
            return made


def entangled(sample, rng):
    """The edited scene with the biases of Prompt-to-Prompt pairs (figure 2 of the paper): 40 % of the subject's colour
    leaks into the background, of a new background into the objects, and everything drifts by up to 2 pixels."""
    def leak(colour):
        return tuple(.6 * a + .4 * b for a, b in zip(RGB[colour], RGB[sample.subject]))
    scene, on_background = sample.edited, sample.kind != "background"
    objects = tuple(replace(o, x=o.x + rng.uniform(-2, 2), y=o.y + rng.uniform(-2, 2),
                            colour=o.colour if on_background else leak(o.colour)) for o in scene.objects)
    return replace(scene, objects=objects, background=leak(scene.background) if on_background else scene.background)


def truths(sample):
    """All true edited scenes: for `add`, which names no place, one for every free place (a grid of 2 pixels, three
    sizes), so that a judge can take the one that is nearest to an editor's output; else the one."""
    if sample.kind != "add":
        return [sample.edited]
    new = sample.edited.objects[-1]
    spots = [(x, y, r) for r in (5., 6., 7.) for x in range(6, SIZE - 5, 2) for y in range(6, SIZE - 5, 2)
             if r + 1 <= min(x, y, SIZE - x, SIZE - y) and is_free(x, y, r, sample.scene.objects)]
    return [sample.edited] + [replace(sample.edited, objects=sample.scene.objects + (replace(new, x=x, y=y, radius=r),))
                              for x, y, r in spots]


def render(scenes):
    """Scenes -> images (B, 3, SIZE, SIZE) in [-1, 1], shapes antialiased by their signed distance."""
    def rgb(colour):
        return colour if isinstance(colour, tuple) else RGB[colour]
    y, x = torch.meshgrid(*[torch.arange(SIZE) + .5] * 2, indexing="ij")
    shade = torch.tensor([s.shade for s in scenes])[:, :, None, None] / (SIZE / 2)          # (B, 2, 1, 1)
    light = 1 + shade[:, :1] * (x - SIZE / 2) + shade[:, 1:] * (y - SIZE / 2)               # (B, 1, S, S)
    images = torch.tensor([rgb(s.background) for s in scenes])[:, :, None, None] / 255 * light
    for i in range(max(len(s.objects) for s in scenes)):
        rows = [b for b, s in enumerate(scenes) if i < len(s.objects)]
        objects = [scenes[b].objects[i] for b in rows]
        centre = torch.tensor([(o.x, o.y, o.radius) for o in objects])[:, :, None, None]
        dx, dy, r = (x - centre[:, 0]), (y - centre[:, 1]), centre[:, 2]                    # (b, S, S), (b, S, S), (b, 1, 1)
        ax, ay = dx.abs(), dy.abs()
        distances = torch.stack([                                                           # negative inside
            (dx ** 2 + dy ** 2).sqrt() - r,
            torch.maximum(ax, ay) - .85 * r,
            torch.maximum(dy, .866 * ax - .5 * dy) - .6 * r,
            torch.minimum(torch.maximum(ax - r, ay - .36 * r), torch.maximum(ay - r, ax - .36 * r))])
        distance = distances[[SHAPES.index(o.shape) for o in objects], torch.arange(len(rows))]
        cover = (.5 - distance).clamp(0, 1)[:, None]                                        # (b, 1, S, S)
        colour = torch.tensor([rgb(o.colour) for o in objects])[:, :, None, None] / 255
        images[rows] = images[rows] * (1 - cover) + colour * cover
    return images.clamp(0, 1) * 2 - 1
