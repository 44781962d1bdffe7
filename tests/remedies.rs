//! Advice that can be followed: each row makes the program fail, reads what it advises, does that, and sees it work.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use depthshrinker::io::tensors::write_tensors;
use depthshrinker::io::write_model;
use depthshrinker::io::{DataInfo, ModelInfo};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;
use libtest_mimic::{Arguments, Trial};

/// What the folder of every row holds: models `rgb.safetensors` (40x40x3, 7 classes), `gray.safetensors` (28x28x1, 10
/// classes, of the embedded data's shape) and `resnet.safetensors`, images `x.safetensors` and `gray-x.safetensors` for the
/// first two, and PyTorch's `timm.pth` and `old.pth`.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let model = |net: &str, file: &str, shape: Shape, classes: usize| {
            let graph = build(net, &NetworkOptions::new(shape, classes)).unwrap();
            let model = Model::initialise(graph, 1).unwrap();
            let data = DataInfo::pretrained("mobilenet_v2", shape, classes);
            write_model(&folder.path(file), &model, &ModelInfo { data }).unwrap();
        };
        model("mobilenetv2-0.1", "rgb.safetensors", Shape::new(40, 40, 3), 7);
        model("mobilenetv2-0.1", "gray.safetensors", Shape::new(28, 28, 1), 10);
        model("resnet18", "resnet.safetensors", Shape::new(40, 40, 3), 7);
        let images = |file: &str, shape: &[usize]| {
            let tensors = [("input".to_owned(), Tensor::full(shape, 0.5))].into();
            write_tensors(&folder.path(file), &tensors, &Default::default()).unwrap();
        };
        images("x.safetensors", &[2, 3, 40, 40]);
        images("gray-x.safetensors", &[2, 1, 28, 28]);
        for (file, fixture) in [("timm.pth", "timm.pth"), ("old.pth", "torchvision-old.pth")] {
            let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/import");
            fs::copy(fixtures.join(fixture), folder.path(file)).unwrap();
        }
        folder
    }

    fn path(&self, file: &str) -> std::path::PathBuf {
        self.0.path().join(file)
    }

    /// Runs the program on one thread, which is what the settings ask for where they say nothing.
    fn run(&self, line: &str) -> Output {
        let mut program = Command::new(env!("CARGO_BIN_EXE_depthshrinker"));
        program.current_dir(self.0.path()).args(line.split_whitespace()).args(["--device", "cpu"]);
        program.env_remove("DEPTHSHRINKER_DATA").env("RAYON_NUM_THREADS", "1").output().unwrap()
    }

    /// What a failing command says, in one line of standard error; behind it only where to find help.
    fn fails(&self, line: &str) -> String {
        let run = self.run(line);
        let text = String::from_utf8(run.stderr).unwrap();
        assert!(matches!(run.status.code(), Some(1 | 2)), "{line}: {:?}, {text}", run.status);
        let mut errors = text.lines().skip_while(|line| !line.starts_with("error: "));
        let error = errors.next().unwrap_or_else(|| panic!("{line}: {text}"));
        assert!(errors.all(|line| line.is_empty() || line == "For more information, try '--help'."), "{line}: {text}");
        error.to_owned()
    }

    /// What a command that works says on standard output.
    fn works(&self, line: &str) -> String {
        let run = self.run(line);
        assert!(run.status.success(), "{line}: {}", String::from_utf8_lossy(&run.stderr));
        String::from_utf8(run.stdout).unwrap()
    }
}

/// A command that fails, what it advises, and the commands that follow the advice.
struct Row {
    name: &'static str,
    /// What makes the failing one's files, as [`prepare`] takes it.
    before: &'static [&'static str],
    fails: &'static str,
    advises: &'static str,
    /// What follows the advice, as [`prepare`] takes it.
    works: &'static [&'static str],
}

/// The quick part of a training on the embedded data, in the narrowest network.
const TRAIN: &str = "train --net mobilenetv2-0.1 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q";

const ROWS: &[Row] = &[
    Row {
        name: "a .pth file as a model of eval",
        before: &[],
        fails: "infer timm.pth --input x.safetensors --output y.safetensors",
        advises: "make a model of it first with `depthshrinker import NET FILE -o MODEL`",
        works: &[
            "import mobilenetv2-0.1 timm.pth --image-size 40 -o m.safetensors",
            "infer m.safetensors --input x.safetensors --output y.safetensors",
        ],
    },
    Row {
        name: "PyTorch's old form as a model of merge",
        before: &[],
        fails: "merge old.pth --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors",
        advises: "import NET FILE -o MODEL",
        works: &[
            "import mobilenetv2-0.1 old.pth --image-size 40 -o i.safetensors",
            "merge i.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors",
        ],
    },
    Row {
        name: "an ONNX file as a model of export",
        before: &["export rgb.safetensors -o m.onnx"],
        fails: "export m.onnx -o n.onnx",
        advises: "give the model file that it was exported from",
        works: &["export rgb.safetensors -o n.onnx"],
    },
    Row {
        name: "an ONNX file to import",
        before: &["export rgb.safetensors -o m.onnx"],
        fails: "import mobilenetv2-0.1 m.onnx -o n.safetensors",
        advises: "with `torch.save(model.state_dict(), path)` and import those",
        works: &["import mobilenetv2-0.1 timm.pth -o n.safetensors"],
    },
    Row {
        name: "PyTorch's file as images",
        before: &[],
        fails: "infer rgb.safetensors --input timm.pth --output y.safetensors",
        advises: "save the images with `safetensors.torch.save_file({'input': images}, path)`",
        works: &["infer rgb.safetensors --input x.safetensors --output y.safetensors"],
    },
    Row {
        name: "images of another shape",
        before: &[],
        fails: "infer rgb.safetensors --input gray-x.safetensors --output y.safetensors",
        advises: "the model takes [n, 3, 40, 40]; make it of that shape",
        works: &["infer rgb.safetensors --input x.safetensors --output y.safetensors"],
    },
    Row {
        name: "a checkpoint as a model",
        before: &[TRAIN],
        fails: "infer runs/train/checkpoint.safetensors --input gray-x.safetensors --output y.safetensors",
        advises: "give a model file of the run's folder",
        works: &["infer runs/train/original.safetensors --input gray-x.safetensors --output y.safetensors"],
    },
    Row {
        name: "weights as a model",
        before: &[],
        fails: "eval x.safetensors",
        advises: "holds weights but no network; name the network with `depthshrinker import NET WEIGHTS -o MODEL`",
        works: &["import mobilenetv2-0.1 timm.pth -o m.safetensors"],
    },
    Row {
        name: "a model to import",
        before: &["merge gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors"],
        fails: "import mobilenetv2-0.1 m.safetensors -o n.safetensors",
        advises: "it is a model of this program already and need not be imported",
        works: &["eval m.safetensors --test-limit 20"],
    },
    Row {
        name: "weights of another width",
        before: &[],
        fails: "import mobilenetv2-1.0 timm.pth -o m.safetensors",
        advises: "give the network these weights are of",
        works: &["import mobilenetv2-0.1 timm.pth -o m.safetensors"],
    },
    Row {
        name: "weights of another family",
        before: &[],
        fails: "import resnet18 timm.pth -o m.safetensors",
        advises: "known are those of timm, torchvision, mmpretrain, Hugging Face; give the network these weights are of",
        works: &["import mobilenetv2-0.1 timm.pth -o m.safetensors"],
    },
    Row {
        name: "weights that diverged",
        before: &[],
        fails: "import mobilenetv2-0.1 diverged.safetensors -o m.safetensors",
        advises: "take weights from before they diverged",
        works: &["import mobilenetv2-0.1 timm.pth -o m.safetensors"],
    },
    Row {
        name: "no classifier in the file",
        before: &[],
        fails: "import mobilenetv2-0.1 headless.safetensors -o m.safetensors",
        advises: "the file has no classifier; --classes N gives the network a fresh one",
        works: &["import mobilenetv2-0.1 headless.safetensors --classes 3 -o m.safetensors"],
    },
    Row {
        name: "preprocessing for another number of channels",
        before: &[],
        fails: "import mobilenetv2-0.1 one-channel.safetensors --image-size 28 --preprocessing mobilenet_v2 -o m.safetensors",
        advises: "leave --preprocessing out, and give infer numbers, --input",
        works: &[
            "import mobilenetv2-0.1 one-channel.safetensors --image-size 28 -o m.safetensors",
            "infer m.safetensors --input gray-x.safetensors --output y.safetensors",
        ],
    },
    Row {
        name: "pictures for a model that does not know how",
        before: &["import mobilenetv2-0.1 one-channel.safetensors --image-size 28 -o m.safetensors"],
        fails: "infer m.safetensors photo.png",
        advises: "give normalised --input",
        works: &["infer m.safetensors --input gray-x.safetensors --output y.safetensors"],
    },
    Row {
        name: "nothing to look at",
        before: &[],
        fails: "infer rgb.safetensors",
        advises: "give --input FILE or pictures",
        works: &["infer rgb.safetensors photo.png", "infer rgb.safetensors --input x.safetensors"],
    },
    Row {
        name: "a picture that is none",
        before: &["write drawing.png GIF89a"],
        fails: "infer rgb.safetensors photo.png drawing.png",
        advises: "drawing.png: is neither JPEG nor PNG; replace or remove it",
        works: &["infer rgb.safetensors photo.png"],
    },
    Row {
        name: "an unknown preprocessing",
        before: &[],
        fails: "import mobilenetv2-0.1 timm.pth --preprocessing none -o m.safetensors",
        advises: "give a network of timm, torchvision or Hugging Face, with its weights where it has several, such as \
                  resnet18.tv_in1k",
        works: &["import mobilenetv2-0.1 timm.pth --preprocessing resnet18.tv_in1k -o m.safetensors"],
    },
    Row {
        name: "resuming with another number of classes",
        before: &[
            "train --net mobilenetv2-0.1 --data ten --image-size 32 --epochs 1 --batch 5 -q",
            "lose ten/train/9 ten/val/9",
        ],
        fails: "train --resume",
        advises: "--force",
        works: &["train --net mobilenetv2-0.1 --data ten --image-size 32 --epochs 1 --batch 5 -q --force"],
    },
    Row {
        name: "a damaged checkpoint",
        before: &[TRAIN, "lose runs/train/original.safetensors", "damage runs/train/checkpoint.safetensors"],
        fails: "train --resume",
        advises: "make or download it again",
        works: &["train --net mobilenetv2-0.1 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q --force"],
    },
    Row {
        name: "a model in the place of a checkpoint",
        before: &[
            TRAIN,
            "lose runs/train/original.safetensors",
            "copy gray.safetensors runs/train/checkpoint.safetensors",
        ],
        fails: "train --resume",
        advises: "is no checkpoint of this program; start again with --force",
        works: &["train --net mobilenetv2-0.1 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q --force"],
    },
    Row {
        name: "other settings on resume",
        before: &[TRAIN, "lose runs/train/original.safetensors"],
        fails: "train --resume --epochs 2",
        advises: "so leave out what differs, or give another --out or --force",
        works: &["train --resume"],
    },
    Row {
        name: "an unfinished run",
        before: &[TRAIN, "lose runs/train/original.safetensors"],
        fails: TRAIN,
        advises: "--resume goes on with it, --force replaces it",
        works: &["train --resume"],
    },
    Row {
        name: "a run over the model that it starts from",
        before: &[TRAIN],
        fails: "search runs/train/original.safetensors --keep 16 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q \
                --out runs/train --force",
        advises: "give another --out",
        works: &[
            "search runs/train/original.safetensors --keep 16 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q \
             --out runs/other",
        ],
    },
    Row {
        name: "a folder that is taken",
        before: &[TRAIN],
        fails: TRAIN,
        advises: "holds a finished run; give another --out, or --force to replace it",
        works: &["train --net mobilenetv2-0.1 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q --out other"],
    },
    Row {
        name: "no run to resume",
        before: &[],
        fails: "train --resume",
        advises: "leave out --resume to start one",
        works: &[TRAIN],
    },
    Row {
        name: "a mask with an entry too many",
        before: &[],
        fails: "merge resnet.safetensors --padding reorder --keep-list 1,1,1,1,1,1,1,0,0 -o m.safetensors",
        advises: "give one 0 or 1 per block, or, if an older version wrote the model",
        works: &["merge resnet.safetensors --padding reorder --keep-list 1,1,1,1,1,1,1,0 -o m.safetensors"],
    },
    Row {
        name: "a merge that only reorder can do",
        before: &[],
        fails: "merge resnet.safetensors --keep-list 1,1,1,1,1,1,1,0 -o m.safetensors",
        advises: "--padding reorder or keep this block",
        works: &["merge resnet.safetensors --padding reorder --keep-list 1,1,1,1,1,1,1,0 -o m.safetensors"],
    },
    Row {
        name: "a merge of nothing",
        before: &[],
        fails: "merge gray.safetensors -o m.safetensors",
        advises: "say which blocks keep their activations with --keep-list",
        works: &["merge gray.safetensors --keep-list 0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0 -o m.safetensors"],
    },
    Row {
        name: "a block that is merged already",
        before: &["merge gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors"],
        fails: "merge m.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0,0 -o n.safetensors",
        advises: "start from the model from before",
        works: &["merge gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0,0 -o n.safetensors"],
    },
    Row {
        name: "a published mask of another name",
        before: &[],
        fails: "merge gray.safetensors --keep-list mbv2-ds-z -o m.safetensors",
        advises: "give 0s and 1s with commas, or one of mbv2-1.4-ds-a, mbv2-1.4-ds-b",
        works: &[
            "merge gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors",
            "merge gray.safetensors --keep-list mbv2-1.4-ds-b -o n.safetensors",
        ],
    },
    Row {
        name: "a mask of other numbers",
        before: &[],
        fails: "merge gray.safetensors --keep-list 1,0,2 -o m.safetensors",
        advises: "a keep list is 0s and 1s with commas, such as 1,0,1",
        works: &["merge gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors"],
    },
    Row {
        name: "a mask with an entry too few",
        before: &[],
        fails: "merge gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors",
        advises: "has 16 entries, the network 17 blocks; give one 0 or 1 per block",
        works: &["merge gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 -o m.safetensors"],
    },
    Row {
        name: "a plan that is none",
        before: &["write plan.json {\"scores\":[1]}"],
        fails: "merge gray.safetensors --plan plan.json -o m.safetensors",
        advises: "it needs \"kept\": one 0 or 1 per block",
        works: &[
            "write plan.json {\"kept\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0]}",
            "merge gray.safetensors --plan plan.json -o m.safetensors",
        ],
    },
    Row {
        name: "half precision on the CPU by the settings",
        before: &["write half.toml precision = \"f16\""],
        fails: "eval gray.safetensors --test-limit 20 --config half.toml",
        advises: "take --precision f32",
        works: &["eval gray.safetensors --test-limit 20 --config half.toml --precision f32"],
    },
    Row {
        name: "half precision in .safetensors",
        before: &[],
        fails: "export gray.safetensors -o m.safetensors --precision f16",
        advises: "leave out --precision",
        works: &["export gray.safetensors -o m.safetensors", "eval m.safetensors --test-limit 20"],
    },
    Row {
        name: "ONNX in bf16",
        before: &[],
        fails: "export gray.safetensors -o m.onnx --precision bf16",
        advises: "use --precision f32 or f16",
        works: &[
            "export gray.safetensors -o m.onnx --precision f32",
            "export gray.safetensors -o n.onnx --precision f16",
        ],
    },
    Row {
        name: "an unknown precision",
        before: &[],
        fails: "export gray.safetensors -o m.onnx --precision half",
        advises: "expected f32, f16 or bf16",
        works: &["export gray.safetensors -o m.onnx --precision f16"],
    },
    Row {
        name: "a file without an ending",
        before: &[],
        fails: "export gray.safetensors -o model",
        advises: "name it .onnx or .safetensors",
        works: &["export gray.safetensors -o model.onnx", "export gray.safetensors -o model.safetensors"],
    },
    Row {
        name: "a model over itself",
        before: &[],
        fails: "export gray.safetensors -o gray.safetensors",
        advises: "give another output",
        works: &["export gray.safetensors -o other.safetensors"],
    },
    Row {
        name: "a folder that is not there",
        before: &[],
        fails: "export gray.safetensors -o deep/m.onnx",
        advises: "create the folder first",
        works: &["export gray.safetensors -o m.onnx"],
    },
    Row {
        name: "an image size for data that has one",
        before: &[],
        fails: "eval gray.safetensors --image-size 32 --test-limit 20",
        advises: "leave it out",
        works: &["eval gray.safetensors --test-limit 20"],
    },
    Row {
        name: "data of other images",
        before: &[],
        fails: "eval rgb.safetensors --test-limit 20",
        advises: "give other --data or another model",
        works: &["eval gray.safetensors --test-limit 20"],
    },
    Row {
        name: "data of other classes",
        before: &["import mobilenetv2-0.1 timm.pth --image-size 32 -o m.safetensors"],
        fails: "eval m.safetensors --data ten",
        advises: "or import weights with --classes",
        works: &[
            "import mobilenetv2-0.1 timm.pth --image-size 32 --classes 10 -o n.safetensors",
            "eval n.safetensors --data ten",
        ],
    },
    Row {
        name: "unknown data",
        before: &[],
        fails: "eval gray.safetensors --data nothing --test-limit 20",
        advises: "expected embedded, fashion-mnist,",
        works: &["eval gray.safetensors --data embedded --test-limit 20"],
    },
    Row {
        name: "a folder of pictures without its parts",
        before: &[],
        fails: "train --net mobilenetv2-0.1 --data ten/train --image-size 32 --epochs 1 --batch 5 -q",
        advises: "has no folder `train`; expected train/<class>/*.jpg and val/<class>/*.jpg",
        works: &["train --net mobilenetv2-0.1 --data ten --image-size 32 --epochs 1 --batch 5 -q"],
    },
    Row {
        name: "a data folder beside the embedded data",
        before: &[],
        fails: "eval gray.safetensors --data-dir ten",
        advises: "with a data folder, name the set that it holds",
        works: &["eval ten.safetensors --data ten"],
    },
    Row {
        name: "a batch larger than the data",
        before: &[],
        fails: "train --net mobilenetv2-0.1 --train-limit 20 --batch 32 -q",
        advises: "give a smaller batch",
        works: &["train --net mobilenetv2-0.1 --train-limit 20 --test-limit 20 --epochs 1 --batch 20 -q"],
    },
    Row {
        name: "an impossible budget",
        before: &[],
        fails: "search gray.safetensors --keep 17 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q",
        advises: "keep 0 to 16",
        works: &["search gray.safetensors --keep 16 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q"],
    },
    Row {
        name: "no mask to finetune with",
        before: &[],
        fails: "finetune gray.safetensors --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q",
        advises: "give --keep-list or --plan",
        works: &[
            "finetune gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 --train-limit 64 --test-limit 20 \
             --epochs 1 --batch 32 -q",
        ],
    },
    Row {
        name: "a model whose activations are gone",
        before: &[
            "finetune gray.safetensors --keep-list 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0 --train-limit 64 --test-limit 20 \
             --epochs 1 --batch 32 -q -o shrunk.safetensors",
        ],
        fails: "search shrunk.safetensors --keep 16 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q",
        advises: "search in the original model",
        works: &["search gray.safetensors --keep 16 --train-limit 64 --test-limit 20 --epochs 1 --batch 32 -q"],
    },
    Row {
        name: "a kernel's configuration on the CPU",
        before: &[],
        fails: "bench kernels mobilenetv2-0.1 --batch 1 --seconds 0 --size 32 --kernel-config pointwise_forward=64x64-vector",
        advises: "leave --kernel-config out",
        works: &["bench kernels mobilenetv2-0.1 --batch 1 --seconds 0 --size 32 --layer conv_stem"],
    },
    Row {
        name: "too many threads by the settings",
        before: &["write many.toml threads = 5000"],
        fails: "eval gray.safetensors --test-limit 20 --config many.toml",
        advises: "give 0 (all cores) to 4096",
        works: &[
            "eval gray.safetensors --test-limit 20 --config many.toml --threads 1",
            "write many.toml threads = 0",
            "eval gray.safetensors --test-limit 20 --config many.toml",
        ],
    },
    Row {
        name: "too many threads",
        before: &[],
        fails: "eval gray.safetensors --test-limit 20 --threads 5000",
        advises: "give 0 (all cores) to 4096",
        works: &["eval gray.safetensors --test-limit 20 --threads 2"],
    },
    Row {
        name: "an unknown setting",
        before: &["write own.toml epochs = 3"],
        fails: "eval gray.safetensors --test-limit 20 --config own.toml",
        advises: "unknown field `epochs`, expected one of `seed`, `threads`,",
        works: &["write own.toml device = \"cpu\"", "eval gray.safetensors --test-limit 20 --config own.toml"],
    },
    Row {
        name: "a setting out of range",
        before: &["write own.toml train.batch = 0"],
        fails: "train --net mobilenetv2-0.1 --train-limit 64 --test-limit 20 --epochs 1 -q --config own.toml",
        advises: "train: batch is out of range; it must be at least 1",
        works: &["write own.toml train.batch = 1", "eval gray.safetensors --test-limit 20 --config own.toml"],
    },
    Row {
        name: "an unknown network",
        before: &[],
        fails: "plan mobilenet --batch 1",
        advises: "known are mobilenetv2-<width>",
        works: &["plan mobilenetv2-0.1 --batch 1"],
    },
    Row {
        name: "a layer that is not there",
        before: &[],
        fails: "bench kernels mobilenetv2-0.1 --batch 1 --seconds 0 --size 32 --layer conv9",
        advises: "leave --layer out to see their names",
        works: &["bench kernels mobilenetv2-0.1 --batch 1 --seconds 0 --size 32"],
    },
    Row {
        name: "strides of another network",
        before: &[],
        fails: "plan mobilenetv2-0.1 --batch 1 --stage-strides 1,2",
        advises: "give 7 numbers",
        works: &["plan mobilenetv2-0.1 --batch 1 --stage-strides 1,2,2,2,1,2,1"],
    },
    Row {
        name: "head channels without a head",
        before: &[],
        fails: "plan resnet18 --batch 1 --head-channels 8",
        advises: "leave head_channels out",
        works: &["plan resnet18 --batch 1"],
    },
    Row {
        name: "an EfficientNet-Lite without a number",
        before: &[],
        fails: "plan efficientnet-lite --batch 1",
        advises: "efficientnet-lite0 to efficientnet-lite4 exist",
        works: &["plan efficientnet-lite4 --batch 1"],
    },
    Row {
        name: "a network without a width",
        before: &[],
        fails: "plan mobilenetv2-wide --batch 1",
        advises: "write for example mobilenetv2-0.5",
        works: &["plan mobilenetv2-0.5 --batch 1"],
    },
];

/// Carries out a line of a row: a command that works, or a change of the folder's files.
fn prepare(folder: &Folder, line: &str) {
    let (word, rest) = line.split_once(' ').unwrap();
    match word {
        "lose" => rest.split(' ').for_each(|file| {
            let path = folder.path(file);
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }),
        "damage" => {
            let bytes = fs::read(folder.path(rest)).unwrap();
            fs::write(folder.path(rest), &bytes[..bytes.len() / 2]).unwrap();
        }
        "write" => {
            let (file, text) = rest.split_once(' ').unwrap();
            fs::write(folder.path(file), text).unwrap();
        }
        "copy" => {
            let (from, to) = rest.split_once(' ').unwrap();
            fs::copy(folder.path(from), folder.path(to)).unwrap();
        }
        _ => drop(folder.works(line)),
    }
}

/// What few rows need: weights without a classifier, with one image channel and with not-a-number, pictures of ten classes,
/// a model for them.
fn add_files(folder: &Folder) {
    let mut tensors =
        depthshrinker::io::torch::read_torch(&folder.path("timm.pth")).expect("a fixture of the tests of import");
    let mut gray = tensors.clone();
    let stem = gray.get_mut("conv_stem.weight").unwrap();
    (stem.shape[1], stem.data) = (1, stem.data.chunks(27).flat_map(|filter| filter[..9].to_vec()).collect());
    write_tensors(&folder.path("one-channel.safetensors"), &gray, &Default::default()).unwrap();
    let mut diverged = tensors.clone();
    diverged.get_mut("conv_stem.weight").unwrap().data[5] = f32::NAN;
    write_tensors(&folder.path("diverged.safetensors"), &diverged, &Default::default()).unwrap();
    tensors.retain(|name, _| !name.starts_with("classifier"));
    write_tensors(&folder.path("headless.safetensors"), &tensors, &Default::default()).unwrap();
    for (split, class) in ["train", "val"].iter().flat_map(|split| (0..10).map(move |class| (split, class))) {
        let class_folder = folder.path(&format!("ten/{split}/{class}"));
        fs::create_dir_all(&class_folder).unwrap();
        let picture = image::RgbImage::from_pixel(32, 32, image::Rgb([20 * class, 100, 200]));
        picture.save(class_folder.join("a.png")).unwrap();
    }
    image::RgbImage::new(40, 40).save(folder.path("photo.png")).unwrap();
    folder.works("import mobilenetv2-0.1 timm.pth --image-size 32 --classes 10 -o ten.safetensors");
}

fn follow(row: &Row) {
    let folder = Folder::new();
    add_files(&folder);
    row.before.iter().for_each(|line| prepare(&folder, line));
    let error = folder.fails(row.fails);
    assert!(error.contains(row.advises), "{}: {error}", row.name);
    row.works.iter().for_each(|line| prepare(&folder, line));
}

/// Files of other kinds are called what they are, whatever they are given for.
fn other_kinds_are_named() {
    let folder = Folder::new();
    for (name, start, what) in [
        ("array.npy", &b"\x93NUMPY\x01\0v\0{'descr'"[..], "a NumPy array"),
        ("keras.h5", b"\x89HDF\r\n\x1a\n\0\0\0\0", "HDF5"),
        ("photo.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture"),
        ("photo.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a picture"),
        ("weights.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0", "a gzip archive"),
        ("weights.tar", &[&[b'a'; 257][..], b"ustar\x0000", &[0; 248]].concat(), "a tar archive"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a pointer of Git LFS"),
        ("page.pth", b"<!DOCTYPE html><html>", "a web page"),
        ("page.safetensors", b"<html lang=\"en\"><head>", "a web page"),
        ("weights.pkl", b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94.", "a pickle that PyTorch did not write"),
    ] {
        fs::write(folder.path(name), start).unwrap();
        for line in [
            format!("eval {name}"),
            format!("infer {name} --input x.safetensors --output y.safetensors"),
            format!("merge {name} -o m.safetensors"),
            format!("export {name} -o m.onnx"),
            format!("search {name} --keep 16"),
            format!("shrink --model {name}"),
            format!("import mobilenetv2-0.1 {name} -o m.safetensors"),
            format!("infer rgb.safetensors --input {name} --output y.safetensors"),
        ] {
            let error = folder.fails(&line);
            assert!(
                error.contains(&format!("{name}: is ")) && error.contains(what) && error.contains("; "),
                "{line}: {error}"
            );
        }
    }
    // What is of no known kind is damaged.
    fs::write(folder.path("m.safetensors"), b"not a model at all").unwrap();
    assert!(folder.fails("eval m.safetensors").contains("make or download it again"));
}

/// What an import of one channel says of pictures is no advice that would be refused.
fn one_channel_needs_numbers() {
    let folder = Folder::new();
    add_files(&folder);
    let told = folder.works("import mobilenetv2-0.1 one-channel.safetensors --image-size 28 -o m.safetensors");
    assert!(told.contains("known for 3 channels only, not for 1; give infer numbers, --input"), "{told}");
    folder.works("infer m.safetensors --input gray-x.safetensors --output y.safetensors");
}

fn main() {
    let arguments = Arguments::from_args();
    let rows = ROWS.iter().map(|row| {
        Trial::test(format!("advice/{}", row.name), move || {
            follow(row);
            Ok(())
        })
    });
    let mut trials: Vec<Trial> = rows.collect();
    for (name, run) in [
        ("other_kinds_are_named", other_kinds_are_named as fn()),
        ("one_channel_needs_numbers", one_channel_needs_numbers),
    ] {
        trials.push(Trial::test(name, move || {
            run();
            Ok(())
        }));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
