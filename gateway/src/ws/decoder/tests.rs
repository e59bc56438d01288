use super::*;

const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..=125 => bytes.push(0x80 | u8::try_from(length).unwrap()),
        length @ 126..=65_535 => {
            bytes.push(0x80 | 126);
            bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
        length => {
            bytes.push(0x80 | 127);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend(MASK);
    let mut masked = payload.to_vec();
    unmask(&mut masked, MASK);
    bytes.extend(masked);
    bytes
}

fn describe(message: &Message<'_>) -> String {
    match message {
        Message::Text(text) if text.len() > 20 => format!("text of {}", text.len()),
        other => format!("{other:?}"),
    }
}

/// Feeds `bytes` in pieces of `size`.
fn decode(bytes: &[u8], size: usize) -> (Vec<String>, Option<Violation>) {
    let mut decoder = Decoder::new(100_000);
    let mut messages = Vec::new();
    for piece in bytes.chunks(size) {
        let fed = decoder.feed(&mut piece.to_vec(), |message| {
            messages.push(describe(&message));
            Flow::Continue
        });
        if let Err(violation) = fed {
            return (messages, Some(violation));
        }
    }
    assert!(decoder.fragments.is_some() || decoder.partial.is_empty());
    (messages, None)
}

fn violation(bytes: &[u8]) -> (u16, String) {
    let violation = decode(bytes, bytes.len()).1.expect("a violation");
    (violation.code.code(), violation.reason)
}

#[test]
fn messages_are_decoded_however_the_input_is_split() {
    let mut bytes = frame(0x81, b"Hello");
    bytes.extend(frame(0x01, "f\u{e9}".as_bytes()));
    bytes.extend(frame(0x89, b"p"));
    bytes.extend(frame(0x80, b"!"));
    bytes.extend(frame(0x82, &[0xff; 300]));
    bytes.extend(frame(0x81, &vec![b'x'; 70_000]));
    bytes.extend(frame(0x8a, b""));
    bytes.extend(frame(0x88, &[0x03, 0xe8]));
    let expected = [
        "Text(\"Hello\")",
        "Ping([112])",
        "Text(\"f\u{e9}!\")",
        "Binary",
        "text of 70000",
        "Pong",
        "Close(Some(Normal))",
    ];
    for size in [1, 2, 3, 7, 64, 1000, bytes.len()] {
        let (messages, violation) = decode(&bytes, size);
        assert_eq!((messages, violation), (expected.map(String::from).to_vec(), None), "{size}");
    }
}

#[test]
fn a_character_may_span_two_fragments() {
    let mut bytes = frame(0x01, &[0xc3]);
    bytes.extend(frame(0x80, &[0xa9]));
    assert_eq!(decode(&bytes, bytes.len()).0, ["Text(\"\u{e9}\")"]);
}

#[test]
fn invalid_frames_are_rejected_with_the_standard_code() {
    assert_eq!(violation(&[0x81, 0x01, b'x']).0, 1002);
    assert_eq!(violation(&frame(0xc1, b"x")).0, 1002);
    assert_eq!(violation(&frame(0x83, b"x")).0, 1002);
    assert_eq!(violation(&frame(0x09, b"x")).0, 1002);
    assert_eq!(violation(&frame(0x89, &[0; 126])).0, 1002);
    assert_eq!(violation(&frame(0x80, b"x")).0, 1002);
    assert_eq!(violation(&[frame(0x01, b"x"), frame(0x81, b"x")].concat()).0, 1002);
    assert_eq!(violation(&frame(0x88, &[1])).0, 1002);
    assert_eq!(violation(&frame(0x88, &1005_u16.to_be_bytes())).0, 1002);
    assert_eq!(violation(&frame(0x81, &[0xff])).0, 1007);
}

#[test]
fn a_message_over_the_limit_is_rejected_before_its_payload_arrives() {
    let mut header = vec![0x81, 0x80 | 127];
    header.extend(u64::MAX.to_be_bytes());
    let (code, reason) = violation(&header);
    assert_eq!(code, 1009);
    assert!(reason.contains("100000"), "{reason}");
    let fragments = [frame(0x01, &[b'x'; 60_000]), frame(0x00, &[b'x'; 60_000])].concat();
    assert_eq!(violation(&fragments).0, 1009);
}

#[test]
fn random_input_is_decoded_or_rejected() {
    // A random number generator with a fixed seed (Numerical Recipes' LCG) makes the frames reproducible.
    let mut state = 1_u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    for _ in 0..20_000 {
        let mut bytes: Vec<u8> = (0..random() % 40).map(|_| random()).collect();
        if random() % 2 == 0 {
            let payload = bytes.clone();
            bytes = frame(random(), &payload);
        }
        let size = usize::from(random() % 40) + 1;
        let mut decoder = Decoder::new(1000);
        for piece in bytes.chunks(size) {
            if decoder.feed(&mut piece.to_vec(), |_| Flow::Continue).is_err() {
                break;
            }
        }
        assert!(decoder.partial.len() <= 1000 + MAX_HEADER);
    }
}

#[test]
fn input_after_a_pause_is_decoded_later() {
    let bytes: Vec<u8> = (0..5).flat_map(|n| frame(0x81, format!("{n}").as_bytes())).collect();
    let (head, tail) = bytes.split_at(bytes.len() - 3);
    let mut decoder = Decoder::new(100);
    let mut messages = Vec::new();
    let mut pieces = vec![head.to_vec(), tail.to_vec()].into_iter();
    loop {
        let mut input =
            if decoder.is_paused() { Vec::new() } else { pieces.next().unwrap_or_default() };
        if input.is_empty() && !decoder.is_paused() {
            break;
        }
        decoder
            .feed(&mut input, |message| {
                messages.push(describe(&message));
                Flow::Pause
            })
            .unwrap();
    }
    assert_eq!(messages, (0..5).map(|n| format!("Text(\"{n}\")")).collect::<Vec<_>>());
}

#[test]
fn buffered_input_uses_at_most_twice_its_bytes() {
    let large = frame(0x81, &vec![b'x'; 1 << 20]);
    // A large frame in two pieces, and the first byte of the next frame.
    let mut input = [&large[..], &large[..1]].concat();
    let (first, rest) = input.split_at_mut(1 << 19);
    let (mut decoder, mut count) = (Decoder::new(1 << 22), 0);
    for piece in [first, rest] {
        let message = |_: Message<'_>| {
            count += 1;
            Flow::Continue
        };
        decoder.feed(piece, message).unwrap();
        assert!(decoder.buffered_bytes() <= 2 << 19, "{}", decoder.buffered_bytes());
    }
    assert_eq!(count, 1);
    assert!(decoder.buffered_bytes() < 4096 && decoder.is_in_message());
}

#[test]
fn memory_of_a_message_grows_in_few_steps_up_to_its_size() {
    let payload = vec![b'x'; 1 << 20];
    let fragments: Vec<Vec<u8>> = payload.chunks(1 << 10).map(|part| frame(0, part)).collect();
    let fragmented = [frame(0x01, b""), fragments.concat()].concat();
    for bytes in [frame(0x81, &payload), fragmented] {
        let mut decoder = Decoder::new(1 << 20);
        let (mut last, mut changes) = (0, 0);
        for piece in bytes.chunks(1 << 10) {
            decoder.feed(&mut piece.to_vec(), |_| Flow::Continue).unwrap();
            let fragments = decoder.fragments.as_ref().map_or(0, |one| one.bytes.capacity());
            let buffered = if fragments > 0 { fragments } else { decoder.buffered_bytes() };
            changes += usize::from(buffered != last);
            last = buffered;
            assert!(
                decoder.buffered_bytes() <= (1 << 20) + (4 << 10),
                "{}",
                decoder.buffered_bytes()
            );
        }
        assert!(changes <= 40, "{changes} changes");
    }
}
