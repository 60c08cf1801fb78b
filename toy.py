"""The toy world: scenes of coloured shapes, with captions, instructions and TRUE edited images.

A scene is a description; `render` turns descriptions into pixels.  Because an edit changes the
description, the edited image and its caption are exact: the truth that no real data set has.
"""
import random
from dataclasses import dataclass, replace
from itertools import product

import torch

SIZE = 32                                      # pixels, width and height
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (214, 40, 40), "green": (46, 150, 60), "blue": (40, 80, 200),
           "yellow": (245, 210, 40), "purple": (140, 50, 170), "orange": (245, 130, 30)}
BACKGROUNDS = {"white": (238, 238, 238), "black": (28, 28, 28), "gray": (128, 128, 128),
               "pink": (245, 170, 195), "teal": (60, 165, 165), "brown": (115, 75, 45)}
RGB = COLOURS | BACKGROUNDS
LOOKS = list(product(COLOURS, SHAPES))         # of objects: (colour, shape)
KINDS = ("colour", "background", "shape", "remove", "add")        # of edits
SPLITS = ("train", "validation", "test")
BIASES = 0.4, 2                                # of an entangled pair; 0, 0: a true pair


@dataclass(frozen=True)
class Object:
    """A shape with its centre and radius in pixels; the colour is a name or an RGB triple 0-255."""
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
    """Up to three objects on a background, whose brightness changes evenly from edge to edge."""
    background: str
    shade: tuple                               # in x and y: from 1 - shade to 1 + shade
    objects: tuple

    @property
    def caption(self):
        if not self.objects:
            return f"a {self.background} background"
        *names, last = [with_article(o.name) for o in self.objects]
        listed = f"{', '.join(names)} and {last}" if names else last
        return f"{listed} on a {self.background} background"

    @property
    def held_out(self):
        """Whether an object has a look (one in six) that training lacks on this background."""
        colours, background = list(COLOURS), list(BACKGROUNDS).index(self.background)
        return any((colours.index(o.colour) + SHAPES.index(o.shape) + background) % 6 == 0
                   for o in self.objects)


@dataclass(frozen=True)
class Edit:
    """A sample of the paper's table 1: I_input and the true I_edit are `render` of the scenes."""
    kind: str
    scene: Scene
    edited: Scene
    instruction: str                           # C_f
    reverse_instruction: str                   # C_r
    subject: str                               # the colour that leaks in an entangled pair


# ---- scenes and edits -------------------------------------------------------------------------

def with_article(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

def is_free(x, y, radius, others):
    return all((x - o.x) ** 2 + (y - o.y) ** 2 > (radius + o.radius + 1.5) ** 2 for o in others)

def place(rng, others):
    """(x, y, radius) of a new object that touches no other, or None if thirty throws find none."""
    for _ in range(30):
        radius = rng.uniform(4.5, 7.5)
        x, y = [rng.uniform(radius + 1, SIZE - radius - 1) for _ in "xy"]
        if is_free(x, y, radius, others):
            return x, y, radius
    return None

def random_scene(rng):
    background = rng.choice(list(BACKGROUNDS))
    scene = Scene(background, (rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)), ())
    for look in rng.sample(LOOKS, rng.choice((1, 2, 2, 3))):      # so "the red circle" is one
        spot = place(rng, scene.objects)
        if spot:
            scene = replace(scene, objects=scene.objects + (Object(*look, *spot),))
    return scene

def random_edit(rng, scene, kind):
    """One edit of the kind, or None if the scene has no room for it."""
    names = [o.name for o in scene.objects]
    if kind == "background":
        new = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        return Edit(kind, scene, replace(scene, background=new), f"make the background {new}",
                    f"make the background {scene.background}", new)
    if kind == "add":
        spot = place(rng, scene.objects) if len(scene.objects) < 3 else None
        if spot is None:
            return None
        new = Object(*rng.choice([look for look in LOOKS if " ".join(look) not in names]), *spot)
        return Edit(kind, scene, replace(scene, objects=scene.objects + (new,)),
                    f"add {with_article(new.name)}", f"remove the {new.name}", new.colour)
    old = rng.choice(scene.objects)
    if kind == "remove":
        rest = tuple(o for o in scene.objects if o is not old)
        return Edit(kind, scene, replace(scene, objects=rest), f"remove the {old.name}",
                    f"add {with_article(old.name)}", old.colour)
    if kind == "colour":
        new = replace(old, colour=rng.choice([c for c in COLOURS if c != old.colour]))
        texts = f"make the {old.name} {new.colour}", f"make the {new.name} {old.colour}"
    else:
        new = replace(old, shape=rng.choice([s for s in SHAPES if s != old.shape]))
        texts = f"turn the {old.name} into a {new.shape}", f"turn the {new.name} into a {old.shape}"
    if new.name in names:
        return None
    changed = tuple(new if o is old else o for o in scene.objects)
    return Edit(kind, scene, replace(scene, objects=changed), *texts, new.colour)

def edit(split, index, seed=0):
    """Sample `index` of a split, a function of these arguments alone.  The kinds take turns.  No
    training or validation sample shows a held-out combination; every test sample does."""
    rng = random.Random(f"{seed} {split} {index}")
    while True:
        made = random_edit(rng, random_scene(rng), KINDS[index % len(KINDS)])
        if made and (made.scene.held_out or made.edited.held_out) == (split == "test"):
            return made

def entangled(sample, rng, biases=BIASES):
    """The edited scene with the biases of Prompt-to-Prompt's pairs (the paper's figure 2): a part
    of the new colour leaks into the background, or of a new background into the objects, and all
    objects drift by up to some pixels; biases: this part and these pixels."""
    leak, drift = biases

    def leaked(colour):
        return tuple(a + leak * (b - a) for a, b in zip(RGB[colour], RGB[sample.subject]))

    scene, objects = sample.edited, []
    into_objects = sample.kind == "background"
    for o in scene.objects:
        moved = replace(o, x=o.x + rng.uniform(-drift, drift), y=o.y + rng.uniform(-drift, drift))
        objects.append(replace(moved, colour=leaked(o.colour)) if into_objects else moved)
    background = scene.background if into_objects else leaked(scene.background)
    return replace(scene, objects=tuple(objects), background=background)

def truths(sample):
    """All true edited scenes: the one; but "add" names no place, so for it one for every free
    place (a grid of 2 pixels, three sizes), and a judge takes the nearest to an output."""
    scenes, places = [sample.edited], range(6, SIZE - 5, 2)
    if sample.kind != "add":
        return scenes
    for r, x, y in product((5.0, 6.0, 7.0), places, places):
        if r + 1 <= min(x, y, SIZE - x, SIZE - y) and is_free(x, y, r, sample.scene.objects):
            new = replace(sample.edited.objects[-1], x=x, y=y, radius=r)
            scenes.append(replace(sample.edited, objects=sample.scene.objects + (new,)))
    return scenes


# ---- pixels -----------------------------------------------------------------------------------

def render(scenes):
    """Scenes -> images (B, 3, SIZE, SIZE) in [-1, 1], shapes antialiased by their distance."""
    def rgb(colours):                          # names or triples -> (b, 3, 1, 1) in [0, 1]
        return torch.tensor([RGB.get(c, c) for c in colours])[:, :, None, None] / 255

    # the background; its light changes from edge to edge
    y, x = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij")     # (S, S) each
    shade = torch.tensor([s.shade for s in scenes])[:, :, None, None] / (SIZE / 2)
    light = 1 + shade[:, :1] * (x - SIZE / 2) + shade[:, 1:] * (y - SIZE / 2) # (B, 1, S, S)
    images = rgb([s.background for s in scenes]) * light                      # (B, 3, S, S)

    # the first objects of all scenes, then the second, then the third
    for i in range(max(len(s.objects) for s in scenes)):
        rows = [b for b, s in enumerate(scenes) if i < len(s.objects)]
        objects = [scenes[b].objects[i] for b in rows]
        places = torch.tensor([(o.x, o.y, o.radius) for o in objects])[:, :, None, None]
        dx, dy, r = x - places[:, 0], y - places[:, 1], places[:, 2]          # (b, S, S) and r
        ax, ay = dx.abs(), dy.abs()
        bar, post = torch.maximum(ax - r, ay - 0.36 * r), torch.maximum(ay - r, ax - 0.36 * r)
        distances = torch.stack([              # in the order of SHAPES, negative inside
            (dx ** 2 + dy ** 2).sqrt() - r,
            torch.maximum(ax, ay) - 0.85 * r,
            torch.maximum(dy, 0.866 * ax - 0.5 * dy) - 0.6 * r,
            torch.minimum(bar, post)])                                        # (4, b, S, S)
        shapes = [SHAPES.index(o.shape) for o in objects]
        distance = distances[shapes, torch.arange(len(rows))]                 # (b, S, S)
        cover = (0.5 - distance).clamp(0, 1)[:, None]                         # (b, 1, S, S)
        images[rows] = images[rows] * (1 - cover) + rgb([o.colour for o in objects]) * cover
    return images.clamp(0, 1) * 2 - 1
