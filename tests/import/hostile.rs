//! Files that are damaged, or made to harm: refused in one line, in little memory and time.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use depthshrinker::io::torch::parse_torch;
use depthshrinker::tensor::Tensor;

use super::fixture;
#[cfg(target_os = "linux")]
use super::limited;
use super::pickles::{FLOATS, archive, dict_of, int, old, pickled, storage, text, view, zipped};

fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|w| w == from).expect("the pattern is there");
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

/// The archive with the compression method of its entries set to DEFLATE.
fn deflated(mut bytes: Vec<u8>) -> Vec<u8> {
    for (signature, field) in [(b"PK\x03\x04", 8), (b"PK\x01\x02", 10)] {
        let at: Vec<usize> = (0..bytes.len() - 4).filter(|&i| &bytes[i..i + 4] == signature).collect();
        at.into_iter().for_each(|i| bytes[i + field] = 8);
    }
    bytes
}

/// An archive whose three storages are all the bytes of the first.
fn overlapping() -> Vec<u8> {
    let key = |key: &str| [text(key), view(&storage(FLOATS, key, 1024), 0, &[8], &[1])].concat();
    let pickle = [&b"\x80\x02}("[..], &key("0"), &key("1"), &key("2"), b"u."].concat();
    let mut bytes = archive(&[("a/data.pkl", &pickle), ("a/data/0", &[0; 4096]), ("a/data/1", b""), ("a/data/2", b"")]);
    let records: Vec<usize> = (0..bytes.len() - 4).filter(|&i| &bytes[i..i + 4] == b"PK\x01\x02").collect();
    for record in [records[2], records[3]] {
        // Checksum and sizes, and where the entry begins.
        for field in [16..28, 42..46] {
            let first = bytes[records[1]..][field.clone()].to_vec();
            bytes[record..][field].copy_from_slice(&first);
        }
    }
    bytes
}

/// An archive of a state dict of one tensor of this name, over a storage of 16 bytes.
fn named(name: &str, value: &[u8]) -> Vec<u8> {
    let pickle = [&b"\x80\x02}"[..], &text(name), value, b"s."].concat();
    archive(&[("a/data.pkl", &pickle), ("a/data/0", &[0; 16])])
}

/// A pickle that makes a dict of one long list of pairs, `times` times: a file of a few bytes per copy.
fn copied_list(pairs: usize, times: usize) -> Vec<u8> {
    let pair = b"h\x00";
    [
        &b"\x80\x02NN\x86q\x000]("[..],
        &pair.repeat(pairs),
        b"eq\x01ccollections\nOrderedDict\nq\x020",
        &b"h\x02h\x01\x85R0".repeat(times),
        b"}.",
    ]
    .concat()
}

/// A tuple of two of the tuple before, memoised each time: 2^n values by name, n by index.
fn doubled(times: usize) -> Vec<u8> {
    [b"\x80\x02K\x01q\x00".to_vec(), b"0h\x00h\x00\x86q\x00".repeat(times), b".".to_vec()].concat()
}

/// Files that ask for memory or time beyond proportion.
#[cfg(target_os = "linux")]
fn greedy_files() -> Vec<Hostile> {
    let sound = sound_view();
    let nested = |open: &[u8], times: usize| [b"\x80\x02".to_vec(), open.repeat(times), b".".to_vec()].concat();
    let key = text(&"k".repeat(5 << 20));
    let storage_of_key = [b"(", &text("storage")[..], FLOATS, &key, &text("cpu"), &int(4), b"tq\x00Q0"].concat();
    let repeated_key = [b"\x80\x02", &storage_of_key[..], &b"h\x00Q0".repeat(340_000), b"}."].concat();
    let memo = [b"\x80\x04".to_vec(), b")\x94".repeat(500_000), b".".to_vec()].concat();
    let long_name = {
        let header =
            format!("{{\"{}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}}}", "module.".repeat(2 << 20));
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
    };
    vec![
        ("copied", pickled(&copied_list(400_000, 100_000)), "steps"),
        ("doubled", pickled(&doubled(100)), "no tensors by name"),
        ("tuples", pickled(&nested(b")\x85", 500_000)), "no tensors by name"),
        ("lists", pickled(&nested(b"]Na", 300_000)), "no tensors by name"),
        ("memo", pickled(&memo), "no tensors by name"),
        ("objects", pickled(&nested(b"ca\nb\n)\x81", 250_000)), "no tensors by name"),
        ("classes", pickled(&many_classes(200_000)), "no tensors by name"),
        ("key", pickled(&repeated_key), "names a storage by"),
        ("name", named(&"module.".repeat(1 << 20), &sound), "a tensor's name"),
        ("name in safetensors", long_name, "a tensor's name"),
    ]
}

/// A pickle that names as many classes, each once, and makes an object of each.
fn many_classes(count: usize) -> Vec<u8> {
    let object = |i: usize| [b"ctrain\n".to_vec(), format!("C{i:0>200}\n").into_bytes(), b")\x81".to_vec()].concat();
    [b"\x80\x02](".to_vec(), (0..count).flat_map(object).collect(), b"e.".to_vec()].concat()
}

/// The program refuses every hostile file in a quarter of a gibibyte of address space, and in seconds.
#[cfg(target_os = "linux")]
#[test]
fn hostile_files_take_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, expected) in hostile_files().into_iter().chain(greedy_files()) {
        fs::write(folder.path().join("hostile"), &bytes).unwrap();
        let import = ["import", "mobilenetv2-0.1", "hostile", "-o", "out"];
        limited::refuses(folder.path(), &import, &[expected]).unwrap_or_else(|told| panic!("{name}: {told}"));
        assert!(!folder.path().join("out").exists());
    }
}

#[test]
fn the_parts_make_sound_files() {
    let sound = view(&storage(FLOATS, "0", 4), 0, &[2, 2], &[2, 1]);
    let tensors = parse_torch(Path::new("x.pth"), &zipped(&sound)).unwrap();
    assert_eq!(tensors["w"], Tensor::zeros(&[2, 2]));
    let keys = [b"\x80\x02]".to_vec(), text("0"), b"a.".to_vec(), 4u64.to_le_bytes().to_vec(), vec![0; 16]].concat();
    let tensors = parse_torch(Path::new("x.pth"), &old(&dict_of(&sound), &keys)).unwrap();
    assert_eq!(tensors["w"], Tensor::zeros(&[2, 2]));
}

/// A file's name in the table, the file, and what its error says.
type Hostile = (&'static str, Vec<u8>, &'static str);

/// A tensor of four numbers, from which the hostile files are made.
fn sound_view() -> Vec<u8> {
    view(&storage(FLOATS, "0", 4), 0, &[2, 2], &[2, 1])
}

fn hostile_archives() -> Vec<Hostile> {
    let sound = sound_view();
    let whole = zipped(&sound);
    let mut wrong_sum = whole.clone();
    let at = wrong_sum.windows(16).position(|w| w == [0; 16]).unwrap();
    wrong_sum[at + 3] ^= 1;
    let real = fs::read(fixture("timm.pth")).unwrap();
    vec![
        ("empty", vec![], "no file of PyTorch's"),
        ("text", b"weights".to_vec(), "no file of PyTorch's"),
        ("tar, as the oldest PyTorch wrote", [&b"sys_info\0"[..], &[0; 512]].concat(), "no file of PyTorch's"),
        ("zip cut to its magic", b"PK\x03\x04".to_vec(), "damaged zip"),
        ("zip cut in the middle", real[..real.len() / 2].to_vec(), "damaged zip"),
        ("zip without its last byte", real[..real.len() - 1].to_vec(), "damaged zip"),
        ("entries over one another", overlapping(), "overlap"),
        ("zip of something else", archive(&[("readme", b"hello")]), "without a data.pkl"),
        ("zip without its storage", pickled(&dict_of(&sound)), "data/0"),
        ("damaged storage", wrong_sum, "is damaged"),
        ("compressed entries", deflated(whole.clone()), "compressed"),
        ("big-endian", archive(&[("a/byteorder", b"big"), ("a/data.pkl", &dict_of(&sound))]), "big-endian"),
        ("short storage", archive(&[("a/data.pkl", &dict_of(&sound)), ("a/data/0", &[0; 12])]), "has 12 bytes"),
    ]
}

fn hostile_tensors() -> Vec<Hostile> {
    let own = storage(FLOATS, "0", 4);
    vec![
        ("path in a key", zipped(&view(&storage(FLOATS, "../data.pkl", 4), 0, &[4], &[1])), "cannot be read"),
        ("huge storage", zipped(&view(&storage(FLOATS, "0", 1 << 60), 0, &[4], &[1])), "its pickle says"),
        ("huge shape", zipped(&view(&own, 0, &[1 << 40], &[1])), "more numbers than the file can hold"),
        ("overflowing shape", zipped(&view(&own, 0, &[1 << 40, 1 << 40], &[0, 0])), "more numbers than"),
        ("repeated by stride 0", zipped(&view(&own, 0, &[1 << 20], &[0])), "more numbers than"),
        ("negative shape", zipped(&view(&own, 0, &[u64::MAX], &[1])), "a tensor that is none"),
        ("shape beyond storage", zipped(&view(&own, 0, &[5], &[1])), "beyond its storage"),
        ("offset beyond storage", zipped(&view(&own, 3, &[2], &[1])), "beyond its storage"),
        ("huge offset", zipped(&view(&own, i64::MAX as u64, &[1], &[1])), "beyond its storage"),
        ("huge stride", zipped(&view(&own, 1, &[2], &[i64::MAX as u64])), "beyond its storage"),
        ("nine dimensions", zipped(&view(&own, 0, &[1; 9], &[1; 9])), "a tensor that is none"),
        ("shape and strides of two lengths", zipped(&view(&own, 0, &[2, 2], &[1])), "a tensor that is none"),
        (
            "unknown storage",
            zipped(&view(&storage(b"ctorch\nFloat4Storage\n", "0", 4), 0, &[1], &[1])),
            "an object of torch.Float4Storage",
        ),
        (
            "complex storage of half its size",
            zipped(&view(&storage(b"ctorch\nComplexFloatStorage\n", "0", 4), 0, &[1], &[1])),
            "has 16 bytes, its pickle says 32",
        ),
        (
            "storage in two ways",
            zipped(&[&own[..], b"0", &view(&storage(FLOATS, "0", 3), 0, &[1], &[1])].concat()),
            "two ways",
        ),
        ("tensor of no storage", zipped(&view(&int(7), 0, &[1], &[1])), "a tensor that is none"),
    ]
}

fn hostile_pickles() -> Vec<Hostile> {
    let sound = sound_view();
    let nested = |open: &[u8], times: usize| [b"\x80\x02".to_vec(), open.repeat(times), b".".to_vec()].concat();
    let call = |function: &str| {
        pickled(&[b"\x80\x02c", function.as_bytes(), &b"\n("[..], &text("touch /tmp/run"), b"tR."].concat())
    };
    let stack_global = [&b"\x80\x04"[..], &text("posix"), &text("system"), b"\x93", &text("id"), b"\x85R."].concat();
    // Memo slot 0 is a dict that holds itself.
    let cyclic = [&b"\x80\x02}q\x00"[..], &text("state_dict"), b"h\x00s."].concat();
    vec![
        ("os.system", call("os\nsystem"), "names os.system"),
        ("builtins.eval", call("builtins\neval"), "names builtins.eval"),
        ("a whole model", call("torchvision.models.resnet\nResNet"), "an object of torchvision.models.resnet.ResNet"),
        (
            "a name in two lines",
            call("torch._utils\n_rebuild\x1b[31m"),
            "an object of torch._utils._rebuild\\u{1b}[31m",
        ),
        ("posix.system from the stack", pickled(&stack_global), "names posix.system"),
        ("calling a dict", pickled(b"\x80\x02})R."), "calls what is no function"),
        ("INST", pickled(b"\x80\x02(ios\nsystem\n."), "opcode 0x69"),
        ("reading another file's extension", pickled(b"\x80\x02\x82\x01."), "opcode 0x82"),
        ("cyclic", pickled(&cyclic), "no tensors by name"),
        ("list in itself", pickled(b"\x80\x02]q\x00h\x00a."), "no tensors by name"),
        ("deep lists", pickled(&nested(b"]", 1_000_000)), "no tensors by name"),
        ("deep tuples", pickled(&nested(b")\x85", 500_000)), "no tensors by name"),
        ("deep marks", pickled(&nested(b"(", 1_000_000)), "more values than it has made"),
        ("endless", pickled(&nested(b"N0", 4_000_000)), "steps"),
        ("stack underflow", pickled(&nested(b"\x86q\x00h\x00h\x00", 10)), "more values than it has made"),
        ("copied lists", pickled(&copied_list(400_000, 100_000)), "steps"),
        ("long storage key", zipped(&view(&storage(FLOATS, &"k".repeat(5_000_000), 4), 0, &[4], &[1])), "bytes"),
        ("long name of a tensor", named(&"module.".repeat(300), &sound), "a tensor's name"),
        ("an empty tensor's attributes", zipped(b"ctorch\nFloatTensor\n)R}b"), "a tensor that is none"),
        ("attributes of a number", pickled(b"\x80\x02K\x01}b."), "what has none"),
        ("unknown memo", pickled(b"\x80\x02h\x05."), "has not made"),
        ("empty stack", pickled(b"\x80\x02."), "more values than it has made"),
        ("no end", pickled(b"\x80\x02}"), "cut short"),
        ("text longer than the file", pickled(b"\x80\x02X\xff\xff\xff\xff."), "cut short"),
        ("text longer than memory", pickled(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff."), "cut short"),
        ("no text", pickled(b"\x80\x02X\x01\0\0\0\xff."), "no tensors by name"),
        ("a name that is no text", pickled(b"\x80\x02c\xff\nX\n."), "not UTF-8"),
        ("append to a dict", pickled(b"\x80\x02}Na."), "no list"),
        ("odd items", pickled(b"\x80\x02}(Nu."), "no dict"),
        ("no dict", pickled(b"\x80\x02K\x01."), "no tensors by name"),
    ]
}

/// Files of the form before zip.
fn hostile_old_files() -> Vec<Hostile> {
    let sound = sound_view();
    let keys = |count: u64, bytes: usize| {
        [b"\x80\x02]".to_vec(), text("0"), b"a.".to_vec(), count.to_le_bytes().to_vec(), vec![0; bytes]].concat()
    };
    vec![
        ("old, cut behind the magic", old(b"", b""), "cut short"),
        ("old, other protocol", replaced(&old(b"", b""), b"M\xe9\x03", b"M\xea\x03"), "protocol"),
        ("old, cut within a storage", old(&dict_of(&sound), &keys(4, 15)), "ends within the storage"),
        ("old, without its storage", old(&dict_of(&sound), b"\x80\x02]."), "is missing"),
        ("old, wrong count", old(&dict_of(&sound), &keys(u64::MAX, 16)), "its pickle says 4"),
        ("old, unknown storage", old(b"\x80\x02}.", &keys(4, 16)), "no tensor of a known type uses"),
        ("old, os.system", old(b"\x80\x02cos\nsystem\n.", b""), "names os.system"),
    ]
}

fn hostile_files() -> Vec<Hostile> {
    [hostile_archives(), hostile_tensors(), hostile_pickles(), hostile_old_files()].concat()
}

#[test]
fn hostile_files_are_refused_in_one_line() {
    for (name, bytes, expected) in hostile_files() {
        let start = Instant::now();
        let error = parse_torch(Path::new("hostile.pth"), &bytes).expect_err(name).to_string();
        assert!(error.starts_with("hostile.pth: ") && error.contains(expected), "{name}: {error}");
        assert!(!error.chars().any(char::is_control) && error.len() < 500, "{name}: {error:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "{name} took {:?}", start.elapsed());
    }
}

#[test]
fn any_flipped_or_missing_byte_is_refused_or_harmless() {
    for name in ["forms.pth", "forms-old.pth"] {
        let bytes = fs::read(fixture(name)).unwrap();
        for at in 0..bytes.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= change;
                if let Err(error) = parse_torch(Path::new(name), &damaged) {
                    assert!(!error.to_string().contains('\n'), "{name}: {error}");
                }
            }
            assert!(parse_torch(Path::new(name), &bytes[..at]).is_err(), "{name} cut to {at} bytes");
        }
    }
}
