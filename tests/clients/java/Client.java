import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Iterator;
import java.util.stream.Stream;

/** The JDK's HttpClient, as Spring AI and LangChain4j use it: java Client.java URL KEY ECHO_URL; prints "NAME RESULT". */
public class Client {
    static final String CHAT = "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}], \"max_tokens\": 4";
    static String key;

    static HttpRequest request(String url, String body) {
        HttpRequest.Builder builder = HttpRequest.newBuilder(URI.create(url)).timeout(Duration.ofSeconds(100));
        builder.header("authorization", "Bearer " + key);
        if (body == null) return builder.build();
        BodyPublisher bytes = BodyPublishers.ofString(body, StandardCharsets.UTF_8);
        return builder.header("content-type", "application/json").POST(bytes).build();
    }

    static void say(String name, HttpResponse<String> answer) {
        System.out.println(name + " " + answer.statusCode() + " " + answer.body().strip().replace("\n", " "));
    }

    public static void main(String[] given) throws Exception {
        String url = given[0], echo = given[2];
        key = given[1];
        for (HttpClient.Version version : HttpClient.Version.values()) {  // HTTP_2 offers an upgrade with each request
            HttpClient client = HttpClient.newBuilder().version(version).build();
            say(version + " models", client.send(request(url + "/v1/models", null), BodyHandlers.ofString()));
            String chat = url + "/v1/chat/completions", stream = CHAT + ", \"stream\": true}";
            say(version + " chat", client.send(request(chat, CHAT + "}"), BodyHandlers.ofString()));
            say(version + " stream", client.send(request(chat, stream), BodyHandlers.ofString()));
            String tooLong = "{\"prompt\": \"" + "word ".repeat(200_000) + "\"}";
            say(version + " overflow", client.send(request(url + "/v1/completions", tooLong), BodyHandlers.ofString()));
            String unicode = "{\"prompt\": \"世界 🙂 мир\", \"max_tokens\": 16}";
            say(version + " unicode", client.send(request(echo + "/v1/completions", unicode), BodyHandlers.ofString()));
            Thread.sleep(6000);
            say(version + " again", client.send(request(chat, CHAT + "}"), BodyHandlers.ofString()));

            String endless = "{\"prompt\": \"hello\", \"max_tokens\": 1000, \"stream\": true}";
            HttpRequest left = request(echo + "/v1/completions", endless);
            try (Stream<String> lines = client.send(left, BodyHandlers.ofLines()).body()) {
                Iterator<String> each = lines.iterator();
                System.out.println(version + " left " + each.next().startsWith("data: "));
            }
        }
        HttpClient client = HttpClient.newHttpClient();
        key = "wrong";
        say("wrong key", client.send(request(url + "/v1/models", null), BodyHandlers.ofString()));
        System.exit(0);
    }
}
