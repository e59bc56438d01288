//! The codec of all generated clients and servers.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::ProstDecoder;

/// Bytes that each stream reserves for encoding, and as many for decoding. tonic's own 8 KiB is a third
/// of the memory of an idle watch. Below 1 KiB a `BytesMut` that has handed out slices allocates only
/// what the next message needs, instead of its original capacity.
const BUFFER_BYTES: usize = 512;
/// Encoded bytes at which a stream stops adding messages to a frame: tonic's default.
const YIELD_THRESHOLD: usize = 32 * 1024;

/// Protobuf by `prost`, with small buffers that grow to the size of a message.
///
/// `Bytes` fields of a decoded message are slices of the buffer that it was decoded from, which may
/// hold other messages: copy them before keeping them beyond the call.
#[derive(Debug)]
pub struct SmallBufferCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallBufferCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBufferCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ExactEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ExactEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(settings())
    }
}

fn settings() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_THRESHOLD)
}

/// Reserves what a message needs before encoding it.
#[derive(Debug)]
pub struct ExactEncoder<T>(PhantomData<T>);

impl<T: Message> Encoder for ExactEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.encoded_len());
        item.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        settings()
    }
}
